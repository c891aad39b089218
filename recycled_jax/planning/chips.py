"""The chips that programs are compiled for, and what is known of them; all of it through JAX's public `tpu_info`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jax.experimental.pallas import tpu as pltpu


@dataclass(frozen=True)
class Chip:
    """One JAX device of a chip. A v5p device is both cores of a chip (megacore); a TPU7x chip is two devices."""

    name: str
    topology: str  # what the compiler calls a small slice of it
    cores: int  # per device
    bandwidth: int  # bytes per second between HBM and the device
    hbm: int  # bytes of a device
    vmem: int  # bytes of a core
    peak: int  # bfloat16 operations per second of the device
    clock: float  # bundles per second of a core
    compiler_options: Mapping[str, str] = field(default_factory=dict)

    def microseconds(self, *, bytes: int = 0, bundles: int = 0, operations: int = 0) -> float:
        """How long moving the bytes, issuing the bundles or computing takes, whichever is longest."""
        return 1e6 * max(bytes / self.bandwidth, bundles / self.clock, operations / self.peak)


def _chip(
    name: str, topology: str, version: pltpu.ChipVersion, cores: int, compiler_options: Mapping[str, str] | None = None
) -> Chip:
    # `tpu_info` counts per core and leaves out the clock. It follows from the peak rate: an MXU of 128 x 128 takes one
    # row of bfloat16 a cycle. One of 256 x 256 takes two: with one, the clock of v6e would be 3.5 GHz, and the bundles
    # its compiler makes of a plain matrix product would do 1.8 times what its MXUs can.
    info = pltpu.get_tpu_info_for_chip(version, cores)
    rows = 1 if info.mxu_column_size == 128 else 2
    clock = info.bf16_ops_per_second / (2 * info.num_mxus * info.mxu_column_size**2 * rows)
    return Chip(
        name,
        topology,
        cores,
        info.mem_bw_bytes_per_second * cores,
        info.hbm_capacity_bytes * cores,
        info.vmem_capacity_bytes,
        info.bf16_ops_per_second * cores,
        clock,
        compiler_options or {},
    )


# Left alone, XLA keeps bfloat16 arrays of a TPU7x in tiles of 16 rows between operations whose fusions want tiles of 8,
# and lays the weights of all layers out anew in every call: most of the cache's size as temporaries, minutes of compile
# time for 8B. A program that runs on one is well advised to take the options too: LIBTPU_INIT_ARGS="--NAME=VALUE ...".
_TPU7X_OPTIONS = {
    "xla_tpu_enable_large_2nd_minor_layout_for_x16": "false",
    "xla_tpu_control_large_2nd_minor_layout_for_x16": "0",
}

CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v5e", "v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1),
        _chip("v5p", "v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 2),
        _chip("v6e", "v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1),
        _chip("tpu7x", "tpu7x:2x2x1", pltpu.ChipVersion.TPU_7X, 1, _TPU7X_OPTIONS),
    )
}
