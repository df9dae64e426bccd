#include "resident/ticket.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <mutex>
#include <unordered_map>

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

}  // namespace

Tensors left_behind(Tensors pieces, int64_t keep) {
  if (keep != kKeepTicket) return pieces;
  return {ticket_for(std::move(pieces))};
}

bool is_ticket(const Tensors& kept) { return kept.size() == 1 && kept[0].scalar_type() == ScalarType::Long; }

Tensors found_again(const Tensors& kept) {
  if (!is_ticket(kept)) {
    // What hooks on saved tensors have made another number of: no pieces are as small.
    const bool was_ticket = kept.size() == 1 && kept[0].numel() == 1;
    return was_ticket ? Tensors{} : kept;
  }
  return cloakroom().take(*static_cast<const int64_t*>(kept[0].data_ptr()));
}

}  // namespace fastode::resident
