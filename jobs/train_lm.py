"""Ray job: trains a language model by a configuration.

ray job submit --working-dir . -- python jobs/train_lm.py CONFIG.yaml [--set key=value ...]
"""

import sys

from nesa_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
