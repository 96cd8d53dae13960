"""Kernels in C++, compiled at first use by the machine's own compiler; without one, torch's operators do the work."""
