// Every operator's schema, once. No mathematics: implementations are registered per device in cpu/ and cuda/.
//
// Feature maps are [N, C, H, W] in dense channels_last memory; statistics, norm parameters and their gradients are in
// the accumulator's type; `coefs` is float64. Arguments are checked in Python. Meanings: fastode/ops/README.md.
#include <torch/csrc/stable/library.h>

#define FASTODE_NORM "int norm, int groups, float eps, int act, float p, float q"

STABLE_TORCH_LIBRARY(fastode, m) {
  m.def("combine(Tensor[] terms, Tensor coefs, int act, float p, float q) -> Tensor");
  m.def("combine_pair(Tensor[] first, Tensor[] second, Tensor coefs) -> Tensor");
  m.def("norm_act(Tensor[] terms, Tensor coefs, Tensor? weight, Tensor? bias, Tensor? stats, " FASTODE_NORM
        ") -> (Tensor u, Tensor a, Tensor stats)");
  m.def(
      "norm_act_vjp(Tensor h, Tensor cot, Tensor stats, Tensor? weight, Tensor? bias, Tensor[] addends, Tensor coefs, "
      "bool param_grads, " FASTODE_NORM ") -> (Tensor out, Tensor wbar, Tensor bbar)");
  m.def("norm_act_dual(Tensor h, Tensor t, Tensor? weight, Tensor? bias, Tensor? stats, " FASTODE_NORM
        ") -> (Tensor stacked, Tensor stats, Tensor tstats)");
  m.def(
      "norm_act_second(Tensor h, Tensor t, Tensor cot, Tensor stats, Tensor tstats, Tensor? weight, Tensor? bias, "
      "Tensor[] addends, Tensor coefs, bool param_grads, bool tangent, " FASTODE_NORM
      ") -> (Tensor out, Tensor wbar, Tensor bbar)");
  m.def("dots(Tensor v, Tensor[] terms) -> Tensor");
}
