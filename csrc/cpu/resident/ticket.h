// What forward operators return of what they leave to backward, where a tracer asks for results of known shapes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../../constants.h"

namespace fastode::resident {

// The pieces themselves, or for kKeepTicket one small tensor that stands for them and frees them with itself. A traced
// backward is given that ticket and, behind it, the tensors whose gradients it was traced for.
std::vector<torch::stable::Tensor> left_behind(std::vector<torch::stable::Tensor> pieces, int64_t keep);

bool is_ticket(const std::vector<torch::stable::Tensor>& kept);

// The pieces, where a ticket stands for them: once. None where they have been handed over, or where this is a copy of a
// ticket that is gone; a backward then computes everything again.
std::vector<torch::stable::Tensor> found_again(const std::vector<torch::stable::Tensor>& kept);

// Whether autograd's engine will use none of the gradients that a backward was traced for beside its input's: what a
// graph computes was settled when it was traced, as for a training step, where this call may be an attack's.
bool goes_unused(const std::vector<torch::stable::Tensor>& kept);

// Zeros for the gradients of these parameters, of which those that are not `full` are running statistics.
std::vector<torch::stable::Tensor> unused_gradients(const std::vector<torch::stable::Tensor>& parameters,
                                                    const std::vector<bool>& full);

}  // namespace fastode::resident

// Sets how the engine is asked about leaves (csrc/autograd/engine.h); until then it uses all.
extern "C" __attribute__((visibility("default"))) void fastode_ask_engine(bool (*go_unused)(AtenTensorHandle const*,
                                                                                            int64_t));
