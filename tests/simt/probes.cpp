// The operators that test the machine itself.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "control.h"
#include "probes.cuh"

namespace fastode::device::probes {

namespace {

using torch::stable::Tensor;
using Launcher = const char* (*)(const Launch&, const Arguments&);

const std::pair<const char*, Launcher> kProbes[] = {
    {"identity", launch<Kernel<Identity>, Arguments>},   {"turns", launch<Kernel<Turns>, Arguments>},
    {"unset", launch<Kernel<Unset>, Arguments>},         {"mma_bf16", launch<Kernel<Mma<Bf16>>, Arguments>},
    {"mma_f16", launch<Kernel<Mma<F16>>, Arguments>},    {"mma_tf32", launch<Kernel<Mma<Tf32>>, Arguments>},
    {"product", launch<Kernel<Product>, Arguments>},     {"ldmatrix", launch<Kernel<Ldmatrix>, Arguments>},
    {"shuffle", launch<Kernel<Shuffle>, Arguments>},     {"numbers", launch<Kernel<Numbers>, Arguments>},
    {"reversal", launch<Kernel<Reversal>, Arguments>},   {"cluster", launch<Kernel<Cluster>, Arguments>},
    {"grid", launch<Kernel<Grid>, Arguments>},           {"halo", launch<Kernel<Halo>, Arguments>},
    {"divergent", launch<Kernel<Divergent>, Arguments>}, {"deep", launch<Kernel<Deep>, Arguments>},
    {"many", launch<Kernel<Many>, Arguments>},           {"later", launch<Kernel<Later>, Arguments>},
};

// `how`: blocks, threads, bytes of shared memory, blocks of a cluster, whether it is cooperative
void probe(std::string name, std::vector<Tensor> tensors, std::vector<int64_t> numbers, std::vector<int64_t> how) {
  Arguments arguments{};
  for (size_t i = 0; i < tensors.size(); ++i) arguments.tensors[i] = tensors[i].data_ptr();
  for (size_t i = 0; i < numbers.size(); ++i) arguments.numbers[i] = numbers[i];
  for (const auto& [known, launcher] : kProbes) {
    if (name != known) continue;
    const char* error = launcher({.blocks = static_cast<int>(how[0]),
                                  .threads = static_cast<int>(how[1]),
                                  .shared_bytes = static_cast<size_t>(how[2]),
                                  .cluster = static_cast<int>(how[3]),
                                  .cooperative = how[4] != 0},
                                 arguments);
    STD_TORCH_CHECK(error == nullptr, error);
    return;
  }
  STD_TORCH_CHECK(false, "there is no probe ", name);
}

void set_blocks(int64_t blocks) { simt::set_blocks(static_cast<int>(blocks)); }

void set_can_be_asked(bool can) { simt::set_can_be_asked(can); }

void set_order(int64_t order, int64_t seed) {
  simt::set_order(static_cast<simt::Order>(order), static_cast<uint64_t>(seed));
}

std::string take_barriers() { return simt::take_barriers(); }

void leave_out(std::string barrier) { simt::leave_out(barrier); }

std::vector<int64_t> counts() { return {simt::counts(), simt::counts() + simt::kKinds + 2}; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastode_simt, m) {
  m.def("probe(str name, Tensor(a!)[] tensors, int[] numbers, int[] how) -> ()");
  m.def("set_order(int order, int seed) -> ()");
  m.def("set_blocks(int blocks) -> ()");
  m.def("set_can_be_asked(bool can) -> ()");
  m.def("counts() -> int[]");
  m.def("take_barriers() -> str");
  m.def("leave_out(str barrier) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastode_simt, CompositeExplicitAutograd, m) {
  m.impl("probe", TORCH_BOX(&probe));
  m.impl("set_order", TORCH_BOX(&set_order));
  m.impl("set_blocks", TORCH_BOX(&set_blocks));
  m.impl("set_can_be_asked", TORCH_BOX(&set_can_be_asked));
  m.impl("counts", TORCH_BOX(&counts));
  m.impl("take_barriers", TORCH_BOX(&take_barriers));
  m.impl("leave_out", TORCH_BOX(&leave_out));
}

}  // namespace fastode::device::probes
