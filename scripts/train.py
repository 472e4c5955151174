"""Train a model: `python scripts/train.py settings.yaml --max_steps 100`, or the same under `accelerate launch`."""

import sys

from huggingface_hub.errors import StrictDataclassError

from equipoise.configuration import parse_run_settings
from equipoise.training import train


def main() -> None:
    try:
        train(parse_run_settings(sys.argv[1:]))
    except (ValueError, FloatingPointError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
