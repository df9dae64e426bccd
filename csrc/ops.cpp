// Every operator's schema, once. No mathematics: implementations are registered per device in cpu/ and cuda/.
//
// Feature maps of the passes are [N, C, H, W] in dense channels_last memory, those of the resident operators have any
// strides; statistics, norm parameters and their gradients are in the accumulator's type; `coefs` is float64. Arguments
// are checked in Python. Meanings: fastode/ops/README.md, and fastode/ops/resident/README.md.
#include <torch/csrc/stable/library.h>

#define FASTODE_NORM "int norm, int groups, float eps, int act, float p, float q"
// A branch, one step of a solution of it (step.h), a skew field, and an explicit solution of a pair, as
// cpu/resident/engine.h, skew_engine.h and linear.h read them.
#define FASTODE_BRANCH "Tensor[] parameters, int[] units, float[] numbers"
#define FASTODE_STEP "float[] rows, float[] times, bool given, int[] timed, Tensor[] planes"
#define FASTODE_CHAIN "int[] strides, int[] lengths, float step, int act, float p, float q"
#define FASTODE_PAIR "Tensor[] parameters, int[] integers, float[] numbers"
#define FASTODE_MARCH "float[] table, int steps, int[] used"
// An embedded scheme and how its steps are chosen, as cpu/resident_ops.cpp reads them.
#define FASTODE_SOLVER "float[] table, float[] solver, int[] limits, bool per_sample"

STABLE_TORCH_LIBRARY(fastode, m) {
  m.def("combine(Tensor[] terms, Tensor coefs, int act, float p, float q) -> Tensor");
  m.def("combine_pair(Tensor[] first, Tensor[] second, Tensor coefs) -> Tensor");
  // Without coefficients there is one term, which is u itself: that is then not returned.
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
  // Running statistics of norms, each by its factor towards what it has met in every evaluation, one after the other:
  // met [2, C], the mean and the biased variance, of all norms in one evaluation, then in the next. Counts go up by
  // one for each. On the CPU alone, and for tracers, which make dozens of operators of it otherwise.
  m.def(
      "move_running(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counts, Tensor[] met, float[] factors, "
      "float[] unbiased) -> ()");

  // `keep` is one of constants.h, of which devices other than the CPU have no ticket. With `keep_all` forward keeps all
  // that spares backward a convolution; without, only what a training step needs most. Backward is told which by
  // `kept_all`. It writes over what is kept; the schema does not say so, because tracers refuse lists of tensors that
  // are written to, and what they know is a ticket, which no one writes to.
  m.def("resident_ie_forward(Tensor x, " FASTODE_BRANCH
        ", int steps, float step_size, float theta, int keep, bool keep_all) -> (Tensor y, Tensor statistics, Tensor[] "
        "kept)");
  m.def("resident_ie_backward(Tensor x, Tensor cotangent, Tensor[] kept, " FASTODE_BRANCH
        ", int steps, float step_size, float theta, bool detach, bool gradients, bool kept_all) -> "
        "(Tensor x_bar, Tensor[] bars)");
  m.def("resident_rk_forward(Tensor x, " FASTODE_BRANCH
        ", Tensor table, int keep, bool keep_all) -> (Tensor y, Tensor statistics, Tensor[] kept)");
  m.def("resident_rk_backward(Tensor x, Tensor cotangent, Tensor[] kept, " FASTODE_BRANCH
        ", Tensor table, bool gradients, bool table_gradient, bool kept_all) -> (Tensor x_bar, Tensor[] bars, Tensor "
        "table_bar)");
  // A chain of units and a block behind it, as cpu/resident/chain.h reads them: `strides` of each unit, `lengths` of
  // the three parts; `shape` of the result. Backward reads y where the activation is ReLU; without what is kept it
  // evaluates the chain again.
  m.def("resident_chain_forward(Tensor x, " FASTODE_BRANCH ", " FASTODE_CHAIN
        ", int[] shape, int keep, bool last) -> (Tensor y, Tensor statistics, Tensor[] kept)");
  m.def("resident_chain_backward(Tensor x, Tensor y, Tensor cotangent, Tensor[] kept, " FASTODE_BRANCH
        ", " FASTODE_CHAIN ", bool point, bool gradients) -> (Tensor x_bar, Tensor[] bars)");
  // The mean of every channel and a linear layer, which with `lowers` reads and gives bfloat16; `pooled` is what it
  // reads.
  m.def("resident_head_forward(Tensor x, Tensor weight, Tensor? bias, bool lowers) -> (Tensor y, Tensor pooled)");
  m.def(
      "resident_head_backward(Tensor x, Tensor pooled, Tensor cotangent, Tensor weight, bool point, bool gradients) -> "
      "(Tensor x_bar, Tensor[] bars)");
  // Where signs are kept, backward asks for the slopes, too, as `ends`.
  m.def("resident_skew_forward(Tensor y, Tensor z, " FASTODE_PAIR
        ", int keep, bool results, bool y_last, bool z_last) -> (Tensor dy, Tensor dz, Tensor[] kept, Tensor[] signs)");
  m.def(
      "resident_skew_backward(Tensor y, Tensor z, Tensor? y_bar, Tensor? z_bar, Tensor[] kept, Tensor[] "
      "signs, Tensor[] ends, " FASTODE_PAIR
      ", bool need_y, bool need_z, bool weight, bool norms) -> (Tensor y_bar, Tensor z_bar, Tensor[] bars)");
  m.def("resident_march_forward(Tensor x, " FASTODE_PAIR ", " FASTODE_MARCH
        ", int keep, bool last) -> (Tensor y, Tensor[] kept)");
  m.def("resident_march_backward(Tensor x, Tensor cotangent, Tensor[] kept, " FASTODE_PAIR ", " FASTODE_MARCH
        ", bool weight, bool norms) -> (Tensor x_bar, Tensor[] bars)");
  // The log, float64, has what control.h writes of each solve; with `raises` it stays empty, and a solve that cannot go
  // on raises here. `through`: the derivative goes through no step's size (0), the first one's (1) or all (2). Backward
  // without what is kept takes the steps again.
  m.def("resident_solve_forward(Tensor x, " FASTODE_PAIR ", " FASTODE_SOLVER
        ", int keep, int through, bool raises) -> (Tensor y, Tensor log, Tensor[] kept)");
  m.def("resident_solve_backward(Tensor x, Tensor cotangent, Tensor log, Tensor[] kept, " FASTODE_PAIR
        ", " FASTODE_SOLVER ", int through, bool weight, bool norms) -> (Tensor x_bar, Tensor[] bars)");
  // One step of u' = f(t, u). Its maps lie as `resident_enter` makes one of x; `resident_leave` makes a map like x of
  // one.
  m.def("resident_enter(Tensor x) -> Tensor");
  m.def("resident_leave(Tensor map, Tensor x) -> Tensor");
  // The sum of the squares of the combination over atol + rtol max(|u|, |v|), and zero where v is finite, else NaN; and
  // the pull-back of that sum's half, times the factor, to the combination, to u and to v.
  m.def("resident_scaled_squares(Tensor[] terms, float[] coefs, Tensor u, Tensor v, float rtol, float atol) -> Tensor");
  m.def(
      "resident_pull_squares(Tensor[] terms, float[] coefs, Tensor u, Tensor v, float factor, float rtol, float atol) "
      "-> (Tensor error_bar, Tensor u_bar, Tensor v_bar)");
  m.def("resident_step_forward(Tensor x, Tensor state, Tensor? first, " FASTODE_BRANCH ", " FASTODE_STEP
        ", bool keep) -> (Tensor[] slopes, Tensor[] points, Tensor[] kept)");
  m.def(
      "resident_step_backward(Tensor x, Tensor? end_bar, Tensor? carried, Tensor[] slopes, Tensor[] points, Tensor[] "
      "kept, " FASTODE_BRANCH ", " FASTODE_STEP
      ", float[] weights, Tensor? error_bar, float[] error_weights, bool gradients) -> (Tensor state_bar, Tensor? "
      "first_bar, Tensor[] bars, Tensor moments, Tensor product)");
  // The field of two matrix products, alone and solved; with given steps `through` does not count. Log, `through` and
  // `raises` as above.
  m.def("resident_linear_forward(Tensor y, Tensor z, " FASTODE_PAIR ") -> (Tensor dy, Tensor dz)");
  m.def("resident_linear_backward(Tensor y, Tensor z, Tensor? y_bar, Tensor? z_bar, " FASTODE_PAIR
        ", bool need_y, bool need_z, bool gradients) -> (Tensor y_bar, Tensor z_bar, Tensor[] bars)");
  m.def("resident_linear_solve_forward(Tensor x, " FASTODE_PAIR ", " FASTODE_SOLVER
        ", int keep, int through, bool raises) -> (Tensor y, Tensor log, Tensor[] kept)");
  m.def("resident_linear_solve_backward(Tensor x, Tensor cotangent, Tensor log, Tensor[] kept, " FASTODE_PAIR
        ", " FASTODE_SOLVER ", int through, bool gradients) -> (Tensor x_bar, Tensor[] bars)");
}
