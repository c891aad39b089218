"""Static figures of the TPU programs, from the real TPU compiler and without a TPU: `python -m tpu_check`."""
