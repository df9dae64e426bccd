"""What the CUDA kernels compile to: read right from what nvcc and nvdisasm say, and without spills in csrc/cuda."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cuda_kernels
from fastode.native import nvcc

SOURCE = r"""
#include <cstdint>
namespace fastode::cuda {
namespace {
template <int N>
__global__ void __launch_bounds__(64) product(const uint32_t* a, float* out) {
  extern __shared__ uint32_t shared[];
  shared[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  float c[4] = {};
  for (int i = 0; i < N; ++i) {
    uint32_t r[4];
    const uint32_t place = static_cast<uint32_t>(__cvta_generic_to_shared(shared + 4 * (threadIdx.x % 32) + i));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(place));
    for (int again = 0; again < 2; ++again)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%4, %5}, "
                   "{%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
  }
  out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
template __global__ void product<3>(const uint32_t*, float*);
}  // namespace
__global__ void indexes(float* x, int at) {  // an array that is indexed by what only the run knows
  float v[64];
#pragma unroll 1
  for (int i = 0; i < 64; ++i) v[i] = x[i];
#pragma unroll 1
  for (int i = 0; i < 64; ++i) x[i] = v[(i * at) & 63];
}
__global__ void __launch_bounds__(1024) spills(float* x) {
  __shared__ float last[16];
  float v[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) v[i] = x[i * 1024 + threadIdx.x];
  if (threadIdx.x < 16) last[threadIdx.x] = v[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[(i * 7) % 200] + v[199 - i] + last[i % 16];
}
}  // namespace fastode::cuda
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[cuda_kernels.Kernel]:
    root = tmp_path_factory.mktemp("csrc")
    (root / "cuda").mkdir()
    (root / "cuda" / "two.cu").write_text(SOURCE)
    return cuda_kernels.compile_all(root=root)


@pytest.mark.nvcc
def test_each_kernel_has_a_row_for_each_architecture(rows: list[cuda_kernels.Kernel]) -> None:
    assert [(row.kernel, row.architecture, row.warps, row.source) for row in rows] == [
        (kernel, f"sm_{architecture}", warps, "two.cu")
        for kernel, warps in (("indexes", 0), ("product<3>", 2), ("spills", 32))
        for architecture in nvcc.PREBUILT
    ]


@pytest.mark.nvcc
def test_what_is_in_the_code_is_counted(rows: list[cuda_kernels.Kernel]) -> None:
    indexes, product, spills = ([row for row in rows if row.kernel.startswith(name)] for name in "ips")
    for row in indexes:
        assert row.spills == 0 and row.stack == 256, row
    for row in product:
        assert (row.spills, row.stack, row.shared, row.dynamic, row.tensor_core, row.ldmatrix) == (0, 0, 0, None, 6, 3)
        assert 0 < row.registers < 64
        assert row.instructions is not None and 20 < row.instructions < 200
    for row in spills:  # 64 registers are all that 1024 threads have, and 200 numbers are alive
        assert row.registers == 64 and row.spills > 100 and row.stack > 100
        assert (row.shared, row.tensor_core, row.ldmatrix) == (64, 0, 0), row
    table = cuda_kernels.markdown(rows).splitlines()
    assert len(table) == 4 + len(rows)
    assert table[7].startswith("| `product<3>` | two.cu | sm_80 | 2 |") and table[7].endswith("| 6 | 3 | 0.50 |")


@pytest.mark.nvcc
def test_code_that_nvcc_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "broken.cu").write_text("__global__ void broken() { undeclared(); }\n")
    with pytest.raises(RuntimeError, match=r'^broken\.cu for sm_80: .*identifier "undeclared" is undefined'):
        cuda_kernels.compile_all(["80"], tmp_path)


@pytest.mark.parametrize(
    ("written", "short"),
    [
        ("void fastode::cuda::(anonymous namespace)::product<3>(unsigned int const*, float*)", "product<3>"),
        ("fastode::cuda::spills(float*)", "spills"),
        (
            "void fastode::device::kernel<fastode::cuda::Forward<(int)16, fastode::cuda::Bf16>, Args>(Args)",
            "kernel<Forward<(int)16, Bf16>, Args>",
        ),
    ],
)
def test_names_are_short(written: str, short: str) -> None:
    assert cuda_kernels._short(written) == short
