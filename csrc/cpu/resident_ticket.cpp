#include "resident/ticket.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "resident/new_tensors.h"

namespace fastode::resident {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

// A ticket is a number, so that a copy of one, as hooks on saved tensors make it, stands for the same pieces or for
// none. No number is given out twice.
class Cloakroom {
 public:
  int64_t leave(Tensors pieces) {
    const std::lock_guard<std::mutex> lock(mutex_);
    pieces_.emplace(++last_, std::move(pieces));
    return last_;
  }

  Tensors take(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = pieces_.find(number);
    if (found == pieces_.end()) return {};
    Tensors pieces = std::move(found->second);
    pieces_.erase(found);
    return pieces;  // freed by the caller, without the lock
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, Tensors> pieces_;
  int64_t last_ = 0;
};

Cloakroom& cloakroom() {
  static auto* const room = new Cloakroom;  // outlives tensors that are freed at exit
  return *room;
}

Tensor ticket_for(Tensors pieces) {
  auto number = std::make_unique<int64_t>(cloakroom().leave(std::move(pieces)));
  const int64_t one = 1;
  const Tensor ticket = torch::stable::from_blob(number.get(), {&one, 1}, {&one, 1},
                                                 torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                                 ScalarType::Long, [](void* at) {
                                                   const std::unique_ptr<int64_t> number(static_cast<int64_t*>(at));
                                                   cloakroom().take(*number);
                                                 });
  number.release();
  return ticket;
}

std::atomic<bool (*)(AtenTensorHandle const*, int64_t)> engine_leaves_unused{nullptr};

}  // namespace

Tensors left_behind(Tensors pieces, int64_t keep) {
  if (keep != kKeepTicket) return pieces;
  return {ticket_for(std::move(pieces))};
}

bool is_ticket(const Tensors& kept) { return !kept.empty() && kept[0].scalar_type() == ScalarType::Long; }

Tensors found_again(const Tensors& kept) {
  if (!is_ticket(kept)) {
    // What hooks on saved tensors have made another number of: no pieces are as small.
    const bool was_ticket = !kept.empty() && kept[0].numel() == 1;
    return was_ticket ? Tensors{} : kept;
  }
  return cloakroom().take(*static_cast<const int64_t*>(kept[0].data_ptr()));
}

bool goes_unused(const Tensors& kept) {
  const auto go_unused = engine_leaves_unused.load();
  if (!go_unused || kept.size() < 2 || !is_ticket(kept)) return false;
  std::vector<AtenTensorHandle> leaves;
  for (auto leaf = kept.begin() + 1; leaf != kept.end(); ++leaf) leaves.push_back(leaf->get());
  return go_unused(leaves.data(), static_cast<int64_t>(leaves.size()));
}

Tensors unused_gradients(const Tensors& parameters, const std::vector<bool>& full) {
  Tensors zeros;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& like = parameters[i];
    if (!full[i])
      zeros.push_back(new_vector(0, like.scalar_type()));
    else
      zeros.push_back(like.dim() == 4 ? new_weight(like) : new_contiguous(like.scalar_type(), like.sizes()));
    const Tensor& made = zeros.back();
    std::memset(made.data_ptr(), 0, made.numel() * static_cast<int64_t>(made.element_size()));
  }
  return zeros;
}

}  // namespace fastode::resident

void fastode_ask_engine(bool (*go_unused)(AtenTensorHandle const*, int64_t)) {
  fastode::resident::engine_leaves_unused = go_unused;
}
