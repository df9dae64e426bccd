// What forward operators return of what they leave to backward, where a tracer asks for results of known shapes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../../constants.h"

namespace fastode::resident {

// The pieces themselves, or for kKeepTicket one small tensor that stands for them and frees them with itself.
std::vector<torch::stable::Tensor> left_behind(std::vector<torch::stable::Tensor> pieces, int64_t keep);

bool is_ticket(const std::vector<torch::stable::Tensor>& kept);

// The pieces, where a ticket stands for them: once. None where they have been handed over, or where this is a copy of a
// ticket that is gone; a backward then computes everything again.
std::vector<torch::stable::Tensor> found_again(const std::vector<torch::stable::Tensor>& kept);

}  // namespace fastode::resident
