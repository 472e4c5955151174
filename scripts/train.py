"""Train a model: `python scripts/train.py settings.yaml --max_steps 100`, or the same under `accelerate launch`.

Exit status: 0 when the run is finished, 75 when it was stopped and can be resumed (under torchrun 0: it would start
again what does not end with 0; `scripts/launch.sh` gives 75), 1 with an error.
"""

import os
import sys

import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError

from equipoise.configuration import parse_run_settings
from equipoise.training import RESUME_ME, CheckpointError, train


def main() -> None:
    try:
        run = train(parse_run_settings(sys.argv[1:]))
    except (ValueError, FloatingPointError, StrictDataclassError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.stopped is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(RESUME_ME)


if __name__ == "__main__":
    main()
