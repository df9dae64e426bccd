// A scheme as data, rewritten so that it holds the fewest maps. Derivation: README.md of
// fastode/ops/schemes/runge_kutta.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastode::resident {

// u_i = sum_k a(i, k) u_k + b(i, k) F(u_k), rows i = 1 ... stages.
class Scheme {
 public:
  // `table` [2, stages, stages]: alpha and beta. `keeps_all`: the inputs of every unit are kept at every stage.
  // `divides`: rounding may be divided by coefficients, which float64 has no digits to spare for.
  Scheme(int64_t stages, const double* table, bool keeps_all, bool divides)
      : stages(stages), keeps_all(keeps_all), divides(divides), table_(table, table + 2 * stages * stages) {
    for (int64_t k = 0; k + 1 < stages; ++k)
      if (replaceable(k))
        for (int64_t i = k + 2; i <= stages; ++i)
          if (b(i, k) != 0) replace(i, k);
  }

  double a(int64_t i, int64_t k) const { return table_[(i - 1) * stages + k]; }
  double b(int64_t i, int64_t k) const { return table_[(stages + i - 1) * stages + k]; }
  bool uses(int64_t i, int64_t k) const { return a(i, k) != 0 || b(i, k) != 0; }
  // Whether inner products with F(u_k) can be had from those with u_{k+1}, which is a stage's point and has b times
  // F(u_k) in it: that divides u_{k+1}'s rounding by b, so b must not be small.
  bool leads(int64_t k) const { return divides && k + 1 < stages && std::abs(b(k + 1, k)) >= 0.5; }
  // Whether F(u_k) is used by another stage than the one right after it.
  bool reused(int64_t k) const {
    for (int64_t i = k + 2; i <= stages; ++i)
      if (b(i, k) != 0) return true;
    return false;
  }

  // The gradient of the table that this scheme was made from, in place of a backward program's inner products [2,
  // stages, stages] of the cotangents with u_k and with F(u_k), of which those that `leads` allows are missing.
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
  const bool keeps_all, divides;

 private:
  // Row i had `share` times as much of F(u_k) as u_{k+1} has. Now it has `share` times u_{k+1} in its place.
  struct Move {
    int64_t i, k;
    double share;
  };

  double& alpha(int64_t i, int64_t k) { return table_[(i - 1) * stages + k]; }
  double& beta(int64_t i, int64_t k) { return table_[(stages + i - 1) * stages + k]; }

  // Whether every later stage can read u_{k+1} in place of F(u_k): with factors of at most one its rounding does not
  // grow.
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

  // <bar_i, F(u_k)> where `leads(k)`: u_{k+1} solved for F(u_k), and so from bar_i's products with u_{k+1} and its
  // other terms.
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
