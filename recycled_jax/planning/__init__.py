"""What a model needs of a TPU slice, from programs that the TPU compiler compiles without a TPU: `recycled plan`."""
