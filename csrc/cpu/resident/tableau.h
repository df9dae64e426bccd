// A scheme as data, in the form in which it costs the fewest maps. Derivation: README.md of fastode/ops/runge_kutta.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastode::resident {

// u_i = sum_k a(i, k) u_k + b(i, k) F(u_k), rows i = 1 ... stages.
class Scheme {
 public:
  // `table` [2, stages, stages]: alpha and beta. `frozen`: the input's gradient is the only one that is ever asked for.
  Scheme(int64_t stages, const double* table, bool frozen)
      : stages(stages), frozen(frozen), table_(table, table + 2 * stages * stages) {
    for (int64_t k = 0; k + 1 < stages; ++k)
      if (replaceable(k))
        for (int64_t i = k + 2; i <= stages; ++i)
          if (b(i, k) != 0) replace(i, k);
  }

  double a(int64_t i, int64_t k) const { return table_[(i - 1) * stages + k]; }
  double b(int64_t i, int64_t k) const { return table_[(stages + i - 1) * stages + k]; }
  bool uses(int64_t i, int64_t k) const { return a(i, k) != 0 || b(i, k) != 0; }
  // Whether u_{k+1} is a point of evaluation that has so much of F(u_k) in it that its rounding, which grows by the
  // inverse of that share, spoils no inner product with F(u_k).
  bool leads(int64_t k) const { return k + 1 < stages && std::abs(b(k + 1, k)) >= 0.5; }
  // Whether F(u_k) is used by another stage than the one right after it.
  bool reused(int64_t k) const {
    for (int64_t i = k + 2; i <= stages; ++i)
      if (b(i, k) != 0) return true;
    return false;
  }

  // From a backward program's inner products [2, stages, stages] of the cotangents with u_k and with F(u_k), less those
  // that `leads` has left out: the gradient of the table that this scheme was made from.
  void complete(double* products) const {
    find_images(products);
    for (auto move = moves_.rbegin(); move != moves_.rend(); ++move)
      for (int64_t k = 0; k <= move->k; ++k)
        for (double* of : {products, products + stages * stages})
          of[move->k * stages + k] -= move->share * of[(move->i - 1) * stages + k];
    for (int64_t i = 1; i <= stages; ++i)
      for (int64_t k = i; k < stages; ++k) products[(i - 1) * stages + k] = products[(stages + i - 1) * stages + k] = 0;
  }

  const int64_t stages;
  const bool frozen;

 private:
  // Row i had F(u_k), `share` times as much as u_{k+1} has of it, and now has that much of u_{k+1} instead.
  struct Move {
    int64_t i, k;
    double share;
  };

  double& alpha(int64_t i, int64_t k) { return table_[(i - 1) * stages + k]; }
  double& beta(int64_t i, int64_t k) { return table_[(stages + i - 1) * stages + k]; }

  // Whether every later stage can have u_{k+1} instead of F(u_k) without more of its rounding than it has itself.
  bool replaceable(int64_t k) const {
    const double lead = std::abs(b(k + 1, k));
    for (int64_t i = k + 2; i <= stages; ++i)
      if (!(std::abs(b(i, k)) <= lead)) return false;
    return lead > 0;
  }

  void replace(int64_t i, int64_t k) {
    const double share = b(i, k) / b(k + 1, k);
    for (int64_t j = 0; j <= k; ++j) alpha(i, j) -= share * a(k + 1, j), beta(i, j) -= share * b(k + 1, j);
    alpha(i, k + 1) += share;
    beta(i, k) = 0;
    moves_.push_back({i, k, share});
  }

  // <bar_i, F(u_k)> where u_{k+1} leads from F(u_k), from those of bar_i with u_{k+1} and with what else it is made of.
  void find_images(double* products) const {
    for (int64_t i = 1; i <= stages; ++i) {
      double *alpha = products + (i - 1) * stages, *beta = alpha + stages * stages;
      for (int64_t k = 0; k < i; ++k) {
        if (!leads(k)) continue;
        beta[k] = alpha[k + 1];
        for (int64_t j = 0; j <= k; ++j) beta[k] -= a(k + 1, j) * alpha[j];
        for (int64_t j = 0; j < k; ++j) beta[k] -= b(k + 1, j) * beta[j];
        beta[k] /= b(k + 1, k);
      }
    }
  }

  std::vector<double> table_;
  std::vector<Move> moves_;
};

}  // namespace fastode::resident
