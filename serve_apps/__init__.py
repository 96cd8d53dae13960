"""Ray Serve applications: HTTP in, nesa_ray out."""
