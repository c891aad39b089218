"""The continued pre-training program: `python -m train --config configs/train/NAME.yaml`."""
