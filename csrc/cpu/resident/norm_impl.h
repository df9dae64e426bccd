// Included by one .cpp per arithmetic type.
#pragma once

#include "norm.h"

#define FASTODE_UNROLL _Pragma("GCC unroll 8")

namespace fastode::resident {
namespace {

template <class A>
inline Vec<A> at(const A* row, int64_t block) {
  return load<Vec<A>>(row + block * kLanes<A>);
}

// Calls f(offset) for every pixel of a block.
template <class A, class F>
inline void walk(const Plane<A>& plane, int64_t block, const F& f) {
  for (int64_t y = 0; y < plane.height; ++y) {
    int64_t offset = block * plane.size + plane.origin + y * plane.row;
    for (int64_t x = 0; x < plane.width; ++x, offset += kLanes<A>) f(offset);
  }
}

// Calls f(offset, sums) for every pixel of a block; returns the sums in sums[0].
template <int count, class A, class F>
inline void walk_sums(const Plane<A>& plane, int64_t block, Vec<A>* total, const F& f) {
  constexpr int lanes = kLanes<A>,
                unroll = count > 2 ? 2 : 4;  // independent chains, to hide the latency of an addition
  Vec<A> sums[unroll][count] = {};
  for (int64_t y = 0; y < plane.height; ++y) {
    const int64_t offset = block * plane.size + plane.origin + y * plane.row;
    int64_t x = 0;
    for (; x + unroll <= plane.width; x += unroll) {
      FASTODE_UNROLL for (int k = 0; k < unroll; ++k) f(offset + (x + k) * lanes, sums[k]);
    }
    for (; x < plane.width; ++x) f(offset + x * lanes, sums[0]);
  }
  for (int s = 0; s < count; ++s) {
    total[s] = sums[0][s];
    for (int k = 1; k < unroll; ++k) total[s] += sums[k][s];
  }
}

template <int count, class A>
inline Vec<A> combined(const Combine<A>& combine, Vec<A> value, int64_t offset) {
  value *= combine.scale;
  if constexpr (count >= 0) {
    FASTODE_UNROLL for (int i = 0; i < count; ++i) value += combine.coef[i] * load<Vec<A>>(combine.term[i] + offset);
  } else {
    for (int i = 0; i < combine.count; ++i) value += combine.coef[i] * load<Vec<A>>(combine.term[i] + offset);
  }
  return value;
}

// Calls f with the flag as a compile-time constant.
template <class F>
inline void with_flag(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// P(v) / rstd, given mean(v) and mean(x v).
template <bool measured, class V>
inline V centred(V v, V mean_v, V x, V mean_xv) {
  if constexpr (measured) return v - mean_v - x * mean_xv;
  return v;
}

// Calls f with the number of terms as a compile-time constant, -1 for more than four.
template <class A, class F>
inline void with_count(const Combine<A>& combine, const F& f) {
  switch (combine.count) {
    case 0:
      return f(std::integral_constant<int, 0>{});
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, -1>{});
  }
}

}  // namespace

template <class A>
void moments(const Plane<A>& plane, int64_t blocks, const A* map, A* mean_out, A* squares_out) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, unroll = 4;
  const A width = static_cast<A>(plane.width);
  for (int64_t b = 0; b < blocks; ++b) {
    V mean = {}, squares = {};
    for (int64_t y = 0; y < plane.height; ++y) {
      const A* row = map + b * plane.size + plane.origin + y * plane.row;
      V sums[unroll] = {};
      int64_t x = 0;
      for (; x + unroll <= plane.width; x += unroll) {
        FASTODE_UNROLL for (int k = 0; k < unroll; ++k) sums[k] += load<V>(row + (x + k) * lanes);
      }
      for (; x < plane.width; ++x) sums[0] += load<V>(row + x * lanes);
      const V row_mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / width;
      V deviations[unroll] = {};
      for (x = 0; x + unroll <= plane.width; x += unroll) {
        FASTODE_UNROLL for (int k = 0; k < unroll; ++k) {
          const V d = load<V>(row + (x + k) * lanes) - row_mean;
          deviations[k] += d * d;
        }
      }
      for (; x < plane.width; ++x) {
        const V d = load<V>(row + x * lanes) - row_mean;
        deviations[0] += d * d;
      }
      const V delta = row_mean - mean;
      const A share = A(1) / static_cast<A>(y + 1);
      mean += delta * share;
      squares +=
          (deviations[0] + deviations[1]) + (deviations[2] + deviations[3]) + delta * delta * (width * y * share);
    }
    store<V>(mean_out + b * lanes, mean);
    store<V>(squares_out + b * lanes, squares);
  }
}

// Calls put(block, element, act(norm(h))).
template <class A, class F>
inline void each_value(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const A* h,
                       const F& put) {
  using V = Vec<A>;
  with_activation(act.kind, [&](auto kind) {
    for (int64_t b = 0; b < blocks; ++b) {
      const V mean = at(rows.mean, b), scale = at(rows.rstd, b) * at(rows.weight, b), bias = at(rows.bias, b);
      walk(plane, b,
           [&](int64_t i) { put(b, i, activate<kind(), V>((load<V>(h + i) - mean) * scale + bias, act.arguments)); });
    }
  });
}

// Calls put(block, element, act'(norm(h)) weight P(t)).
template <class A, class F>
inline void each_tangent(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                         const A* h, const A* t, const F& put) {
  using V = Vec<A>;
  with_activation(act.kind, [&](auto kind) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
        const V scale = rstd * weight, mean_t = at(rows.t, b), mean_xt = at(rows.xt, b);
        walk(plane, b, [&](int64_t i) {
          const V x = (load<V>(h + i) - mean) * rstd;
          const V tangent = scale * centred<measured()>(load<V>(t + i), mean_t, x, mean_xt);
          put(b, i, tangent * activate_first<kind(), V>(x * weight + bias, act.arguments));
        });
      }
    });
  });
}

// Calls f with what stores a value at an element of `out`, combined with other maps.
template <class A, class F>
inline void with_store(const Combine<A>& combine, A* out, const F& f) {
  if (combine.count == 0 && combine.scale == 1)
    f([=](int64_t, int64_t i, Vec<A> value) { store<Vec<A>>(out + i, value); });
  else
    f([=, &combine](int64_t, int64_t i, Vec<A> value) { store<Vec<A>>(out + i, combined<-1>(combine, value, i)); });
}

template <class A>
void apply(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const A* h, A* out,
           const Combine<A>& combine) {
  with_store(combine, out, [&](const auto& put) { each_value(plane, blocks, rows, act, h, put); });
}

template <class A>
void cotangent_first(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const A* h,
                     const A* cotangent, A* n, A* sums) {
  using V = Vec<A>;
  with_activation(act.kind, [&](auto kind) {
    for (int64_t b = 0; b < blocks; ++b) {
      const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
      V total[2];
      walk_sums<2>(plane, b, total, [&](int64_t i, V* sum) {
        const V x = (load<V>(h + i) - mean) * rstd;
        const V nbar = load<V>(cotangent + i) * activate_first<kind(), V>(x * weight + bias, act.arguments);
        store<V>(n + i, nbar);
        sum[0] += nbar;
        sum[1] += nbar * x;
      });
      for (int s = 0; s < 2; ++s) store<V>(sums + (s * blocks + b) * kLanes<A>, total[s]);
    }
  });
}

template <class A>
void cotangent_last(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const A* h, const A* n, A* out,
                    const Combine<A>& combine) {
  using V = Vec<A>;
  with_count(combine, [&](auto count) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), scale = rstd * at(rows.weight, b);
        const V constant = rstd * at(rows.n, b), slope = rstd * rstd * at(rows.xn, b);
        walk(plane, b, [&](int64_t i) {
          V value = scale * load<V>(n + i);
          if constexpr (measured()) value = value - constant - slope * (load<V>(h + i) - mean);
          store<V>(out + i, combined<count()>(combine, value, i));
        });
      }
    });
  });
}

template <class A>
void tangent_sums(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const A* h, const A* t, A* sums) {
  using V = Vec<A>;
  for (int64_t b = 0; b < blocks; ++b) {
    const V mean = at(rows.mean, b), rstd = at(rows.rstd, b);
    V total[2];
    walk_sums<2>(plane, b, total, [&](int64_t i, V* sum) {
      const V tangent = load<V>(t + i);
      sum[0] += tangent;
      sum[1] += tangent * (load<V>(h + i) - mean);
    });
    total[1] *= rstd;
    for (int s = 0; s < 2; ++s) store<V>(sums + (s * blocks + b) * kLanes<A>, total[s]);
  }
}

template <class A>
void tangent_apply(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const A* h,
                   const A* t, A* out, const Combine<A>& combine) {
  with_store(combine, out, [&](const auto& put) { each_tangent(plane, blocks, rows, act, h, t, put); });
}

template <class A>
void second_first(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const A* h,
                  const A* t, A* n, A* m, A* sums) {
  using V = Vec<A>;
  with_activation(act.kind, [&](auto kind) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
        const V mean_t = at(rows.t, b), mean_xt = at(rows.xt, b);
        V total[5];
        walk_sums<5>(plane, b, total, [&](int64_t i, V* sum) {
          const V x = (load<V>(h + i) - mean) * rstd, y = x * weight + bias;
          const V tangent = rstd * centred<measured()>(load<V>(t + i), mean_t, x, mean_xt);
          const V first = activate_first<kind(), V>(y, act.arguments);
          const V value_cotangent = load<V>(n + i), tangent_cotangent = load<V>(m + i);
          V nbar = value_cotangent * first;
          if constexpr (kHasSecond<kind()>)
            nbar += activate_second<kind(), V>(y, act.arguments) * tangent * weight * tangent_cotangent;
          const V mbar = tangent_cotangent * first;
          store<V>(n + i, nbar);
          store<V>(m + i, mbar);
          sum[0] += nbar;
          sum[1] += nbar * x;
          sum[2] += mbar;
          sum[3] += mbar * x;
          sum[4] += mbar * tangent;
        });
        for (int s = 0; s < 5; ++s) store<V>(sums + (s * blocks + b) * kLanes<A>, total[s]);
      }
    });
  });
}

template <class A>
void second_last(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const A* h, const A* t, const A* n,
                 const A* m, A* out, A* tangent_out, const Combine<A>& combine) {
  using V = Vec<A>;
  with_count(combine, [&](auto count) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b);
        const V mean_t = at(rows.t, b), mean_xt = at(rows.xt, b), mean_n = at(rows.n, b), mean_xn = at(rows.xn, b);
        const V mean_c = at(rows.c, b), mean_xc = at(rows.xc, b);
        const auto both = [&](int64_t i, V& cotangent) {
          const V x = (load<V>(h + i) - mean) * rstd;
          const V p = rstd * centred<measured()>(load<V>(t + i), mean_t, x, mean_xt);
          const V tangent_cotangent = rstd * centred<measured()>(weight * load<V>(m + i), mean_c, x, mean_xc);
          cotangent = centred<measured()>(weight * load<V>(n + i), mean_n, x, mean_xn);
          if constexpr (measured()) cotangent = cotangent - mean_xt * tangent_cotangent - mean_xc * p;
          cotangent *= rstd;
          return tangent_cotangent;
        };
        if (tangent_out) {
          walk(plane, b, [&](int64_t i) {
            V cotangent;
            const V tangent_cotangent = both(i, cotangent);
            store<V>(out + i, combined<count()>(combine, cotangent, i));
            store<V>(tangent_out + i, tangent_cotangent);
          });
        } else {
          walk(plane, b, [&](int64_t i) {
            V cotangent;
            both(i, cotangent);
            store<V>(out + i, combined<count()>(combine, cotangent, i));
          });
        }
      }
    });
  });
}

template <class A>
void combine_maps(const Plane<A>& plane, int64_t blocks, A* out, const Combine<A>& combine) {
  with_count(combine, [&](auto count) {
    for (int64_t b = 0; b < blocks; ++b)
      walk(plane, b, [&](int64_t i) { store<Vec<A>>(out + i, combined<count()>(combine, Vec<A>{}, i)); });
  });
}

template <class A>
void add_channel_sums(const Plane<A>& plane, int64_t blocks, const A* map, A* sums) {
  using V = Vec<A>;
  for (int64_t b = 0; b < blocks; ++b) {
    V total[1];
    walk_sums<1>(plane, b, total, [&](int64_t i, V* sum) { sum[0] += load<V>(map + i); });
    store<V>(sums + b * kLanes<A>, at(sums, b) + total[0]);
  }
}

template <class A>
double inner_product(const Plane<A>& plane, int64_t blocks, const A* a, const A* b) {
  using V = Vec<A>;
  double result = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    V total[1];
    walk_sums<1>(plane, block, total, [&](int64_t i, V* sum) { sum[0] += load<V>(a + i) * load<V>(b + i); });
    for (int lane = 0; lane < kLanes<A>; ++lane) result += static_cast<double>(total[0][lane]);
  }
  return result;
}

}  // namespace fastode::resident
