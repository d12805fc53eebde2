"""The configurations of the matrix kernels, by batch. ``python -m bench.tune --write`` rewrites this file.

Keys: the kernel; the arithmetic of its product ("16-bit" operands, "tf32", or "ieee" fp32 without tensor cores); the
compute capability from which the entry holds. Values: the batch rows up to which a configuration is taken; a batch
beyond the last samples the weights once. Entries in MEASURED come from a device, the others from the model of
``python -m bench.audit``: tiles within its budgets, and the end of single passes. For a forward pass of 4096 x 4096 on
an H200 it predicts 40 us in a single pass and 56 us in two for 256 rows, 68 us and 67 us for 512: a second tile of rows
draws and reads all weights again.
"""

from fusedbayes.kernels.config import Kernel, MatmulConfig

ANY = 2**63  # rows of a batch of any size

MEASURED: dict[tuple[Kernel, str, int], str] = {}

TABLE: dict[tuple[Kernel, str, int], dict[int, MatmulConfig]] = {
    ("forward", "16-bit", 80): {
        16: MatmulConfig(16, 64, 64),
        32: MatmulConfig(32, 64, 64),
        64: MatmulConfig(64, 64, 64),
        128: MatmulConfig(128, 64, 64),
    },
    ("forward", "16-bit", 90): {
        16: MatmulConfig(16, 64, 64, num_stages=3),
        32: MatmulConfig(32, 64, 128, num_warps=8, num_stages=3),
        64: MatmulConfig(64, 64, 128, num_warps=8, num_stages=3),
        128: MatmulConfig(128, 64, 64, num_warps=8, num_stages=4),
        256: MatmulConfig(256, 64, 64, num_warps=8, num_stages=4),
    },
    ("forward", "16-bit", 100): {
        16: MatmulConfig(16, 64, 64, num_stages=3),
        32: MatmulConfig(32, 64, 64, num_stages=3),
        64: MatmulConfig(64, 64, 64),
        128: MatmulConfig(128, 64, 64, num_warps=8, num_stages=3),
        256: MatmulConfig(256, 64, 64, num_warps=8, num_stages=3),
    },
    ("forward", "tf32", 80): {
        16: MatmulConfig(16, 64, 64),
        32: MatmulConfig(32, 64, 64),
        64: MatmulConfig(64, 64, 64),
    },
    ("forward", "ieee", 80): {
        16: MatmulConfig(16, 64, 32),
        32: MatmulConfig(32, 64, 32),
    },
    ("backward_input", "16-bit", 80): {
        16: MatmulConfig(16, 64, 64),
        32: MatmulConfig(32, 64, 64),
        64: MatmulConfig(64, 64, 64),
        128: MatmulConfig(128, 64, 64),
    },
    ("backward_input", "16-bit", 90): {
        16: MatmulConfig(16, 64, 64, num_stages=3),
        32: MatmulConfig(32, 64, 64, num_stages=3),
        64: MatmulConfig(64, 64, 64, num_stages=3),
        128: MatmulConfig(128, 64, 64),
        256: MatmulConfig(256, 64, 64, num_warps=8, num_stages=3),
    },
    ("backward_input", "16-bit", 100): {
        16: MatmulConfig(16, 64, 64, num_stages=3),
        32: MatmulConfig(32, 64, 64, num_stages=3),
        64: MatmulConfig(64, 64, 64, num_stages=3),
        128: MatmulConfig(128, 64, 64),
        256: MatmulConfig(256, 64, 64, num_warps=8),
    },
    ("backward_input", "tf32", 80): {
        16: MatmulConfig(16, 32, 64),
        32: MatmulConfig(32, 32, 64),
        64: MatmulConfig(64, 32, 64),
    },
    ("backward_input", "ieee", 80): {
        16: MatmulConfig(16, 32, 64),
        32: MatmulConfig(32, 32, 64),
    },
    ("backward_weight", "16-bit", 80): {
        ANY: MatmulConfig(64, 128, 128, num_warps=8, num_stages=3),
    },
    ("backward_weight", "16-bit", 90): {
        ANY: MatmulConfig(64, 128, 128, num_warps=8, num_stages=3, max_registers=128),
    },
    ("backward_weight", "tf32", 80): {
        ANY: MatmulConfig(32, 128, 128, num_warps=8),
    },
    ("backward_weight", "tf32", 90): {
        ANY: MatmulConfig(32, 128, 128, num_warps=8, max_registers=128),
    },
    ("backward_weight", "ieee", 80): {
        ANY: MatmulConfig(16, 128, 128, num_warps=8),
    },
}
