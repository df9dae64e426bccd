// Included by one .cpp per arithmetic type.
#pragma once

#include "walk.h"

namespace fastode::resident {

template <class A>
void moments(const Plane<A>& plane, int64_t blocks, const View<A>& map, A* mean_out, A* squares_out) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>, unroll = 4;
  constexpr int64_t stretch = 64;  // pixels read twice, so while they are in the first cache
  const Area area = area_of(plane, map);
  for (int64_t b = 0; b < blocks; ++b) {
    V mean = {}, squares = {};
    A seen = 0;
    for (int64_t y = 0; y < area.rows; ++y) {
      for (int64_t first = 0; first < area.width; first += stretch) {
        const int64_t last = std::min(first + stretch, area.width);
        const A count = static_cast<A>(last - first);
        V sums[unroll] = {}, deviations[unroll] = {};
        int64_t x = first;
        for (; x + unroll <= last; x += unroll) {
          FASTODE_UNROLL for (int k = 0; k < unroll; ++k) sums[k] += at(map, b, y, x + k);
        }
        for (; x < last; ++x) sums[0] += at(map, b, y, x);
        const V here = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / count;
        for (x = first; x + unroll <= last; x += unroll) {
          FASTODE_UNROLL for (int k = 0; k < unroll; ++k) {
            const V d = at(map, b, y, x + k) - here;
            deviations[k] += d * d;
          }
        }
        for (; x < last; ++x) {
          const V d = at(map, b, y, x) - here;
          deviations[0] += d * d;
        }
        const V delta = here - mean;
        const A share = count / (seen + count);
        mean += delta * share;
        squares += (deviations[0] + deviations[1]) + (deviations[2] + deviations[3]) + delta * delta * (seen * share);
        seen += count;
      }
    }
    store<V>(mean_out + b * lanes, mean);
    store<V>(squares_out + b * lanes, squares);
  }
}

// Calls place(block, y, x, act(norm(h))).
template <class A, class F>
inline void each_value(const Area& area, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                       const View<A>& map, const F& place) {
  using V = Vec<A>;
  const View<A> h = map;
  with_activation(act.kind, [&](auto kind) {
    for (int64_t b = 0; b < blocks; ++b) {
      const V mean = at(rows.mean, b), scale = at(rows.rstd, b) * at(rows.weight, b), bias = at(rows.bias, b);
      walk(area, [&](int64_t y, int64_t x) {
        place(b, y, x, activate<kind(), V>((at(h, b, y, x) - mean) * scale + bias, act.arguments));
      });
    }
  });
}

// Calls place(block, y, x, act'(norm(h)) weight P(t)).
template <class A, class F>
inline void each_tangent(const Area& area, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                         const View<A>& input, const View<A>& input_tangent, const F& place) {
  using V = Vec<A>;
  const View<A> h = input, t = input_tangent;
  with_activation(act.kind, [&](auto kind) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
        const V scale = rstd * weight, mean_t = at(rows.t, b), mean_xt = at(rows.xt, b);
        walk(area, [&](int64_t y, int64_t x) {
          const V xhat = (at(h, b, y, x) - mean) * rstd;
          const V tangent = scale * centred<measured()>(at(t, b, y, x), mean_t, xhat, mean_xt);
          place(b, y, x, tangent * activate_first<kind(), V>(xhat * weight + bias, act.arguments));
        });
      }
    });
  });
}

// Calls f with what stores a value at a pixel of `map`, combined with other maps.
template <class A, class F>
inline void with_store(const Combine<A>& combine, const View<A>& map, const F& f) {
  const View<A> out = map;
  if (combine.count == 0 && combine.scale == 1)
    f([=](int64_t b, int64_t y, int64_t x, Vec<A> value) { put(out, b, y, x, value); });
  else
    f([=, combined = Combined<-1, A>(combine)](int64_t b, int64_t y, int64_t x, Vec<A> value) {
      put(out, b, y, x, combined(value, b, y, x));
    });
}

template <class A>
void apply(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act, const View<A>& h,
           const View<A>& out, const Combine<A>& combine) {
  const Area area = area_of(plane, h, out, combine);
  with_store(combine, out, [&](const auto& place) { each_value(area, blocks, rows, act, h, place); });
}

template <class A>
void cotangent_first(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                     const View<A>& input, const View<A>& cotangent, const View<A>& out, A* sums) {
  using V = Vec<A>;
  const View<A> h = input, g = cotangent, n = out;
  const Area area = area_of(plane, h, g, n);
  with_activation(act.kind, [&](auto kind) {
    for (int64_t b = 0; b < blocks; ++b) {
      const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
      V total[2];
      walk_sums<2, A>(area, total, [&](int64_t y, int64_t x, V* sum) {
        const V xhat = (at(h, b, y, x) - mean) * rstd;
        const V nbar = at(g, b, y, x) * activate_first<kind(), V>(xhat * weight + bias, act.arguments);
        put(n, b, y, x, nbar);
        sum[0] += nbar;
        sum[1] += nbar * xhat;
      });
      for (int s = 0; s < 2; ++s) store<V>(sums + (s * blocks + b) * kLanes<A>, total[s]);
    }
  });
}

template <class A>
void cotangent_last(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const View<A>& input,
                    const View<A>& n_map, const View<A>& out_map, const Combine<A>& combine) {
  using V = Vec<A>;
  const View<A> h = input, n = n_map, out = out_map;
  const Area area = area_of(plane, h, n, out, combine);
  with_count(combine, [&](const auto& combined) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), scale = rstd * at(rows.weight, b);
        const V constant = rstd * at(rows.n, b), slope = rstd * rstd * at(rows.xn, b);
        walk(area, [&](int64_t y, int64_t x) {
          V value = scale * at(n, b, y, x);
          if constexpr (measured()) value = value - constant - slope * (at(h, b, y, x) - mean);
          put(out, b, y, x, combined(value, b, y, x));
        });
      }
    });
  });
}

template <class A>
void tangent_sums(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const View<A>& input,
                  const View<A>& input_tangent, A* sums) {
  using V = Vec<A>;
  const View<A> h = input, t = input_tangent;
  const Area area = area_of(plane, h, t);
  for (int64_t b = 0; b < blocks; ++b) {
    const V mean = at(rows.mean, b), rstd = at(rows.rstd, b);
    V total[2];
    walk_sums<2, A>(area, total, [&](int64_t y, int64_t x, V* sum) {
      const V tangent = at(t, b, y, x);
      sum[0] += tangent;
      sum[1] += tangent * (at(h, b, y, x) - mean);
    });
    total[1] *= rstd;
    for (int s = 0; s < 2; ++s) store<V>(sums + (s * blocks + b) * kLanes<A>, total[s]);
  }
}

template <class A>
void tangent_apply(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                   const View<A>& h, const View<A>& t, const View<A>& out, const Combine<A>& combine) {
  const Area area = area_of(plane, h, t, out, combine);
  with_store(combine, out, [&](const auto& place) { each_tangent(area, blocks, rows, act, h, t, place); });
}

template <class A>
void second_first(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const Unary<A>& act,
                  const View<A>& input, const View<A>& input_tangent, const View<A>& value_cotangent,
                  const View<A>& tangent_cotangent, A* sums) {
  using V = Vec<A>;
  const View<A> h = input, t = input_tangent, n = value_cotangent, m = tangent_cotangent;
  const Area area = area_of(plane, h, t, n, m);
  with_activation(act.kind, [&](auto kind) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
        const V mean_t = at(rows.t, b), mean_xt = at(rows.xt, b);
        V total[5];
        walk_sums<5, A>(area, total, [&](int64_t y, int64_t x, V* sum) {
          const V xhat = (at(h, b, y, x) - mean) * rstd, normed = xhat * weight + bias;
          const V tangent = rstd * centred<measured()>(at(t, b, y, x), mean_t, xhat, mean_xt);
          const V first = activate_first<kind(), V>(normed, act.arguments);
          const V c = at(m, b, y, x);
          V nbar = at(n, b, y, x) * first;
          if constexpr (kHasSecond<kind()>)
            nbar += activate_second<kind(), V>(normed, act.arguments) * tangent * weight * c;
          const V mbar = c * first;
          put(n, b, y, x, nbar);
          put(m, b, y, x, mbar);
          sum[0] += nbar;
          sum[1] += nbar * xhat;
          sum[2] += mbar;
          sum[3] += mbar * xhat;
          sum[4] += mbar * tangent;
        });
        for (int s = 0; s < 5; ++s) store<V>(sums + (s * blocks + b) * kLanes<A>, total[s]);
      }
    });
  });
}

template <class A>
void second_last(const Plane<A>& plane, int64_t blocks, const NormRows<A>& rows, const View<A>& input,
                 const View<A>& input_tangent, const View<A>& n_map, const View<A>& m_map, const View<A>& out_map,
                 const View<A>* tangent_out, const Combine<A>& combine) {
  using V = Vec<A>;
  const View<A> h = input, t = input_tangent, n = n_map, m = m_map, out = out_map;
  const View<A> second_out = tangent_out ? *tangent_out : out_map;
  const Area area = area_of(plane, h, t, n, m, out, second_out, combine);
  with_count(combine, [&](const auto& combined) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b);
        const V mean_t = at(rows.t, b), mean_xt = at(rows.xt, b), mean_n = at(rows.n, b), mean_xn = at(rows.xn, b);
        const V mean_c = at(rows.c, b), mean_xc = at(rows.xc, b);
        const auto both = [&](int64_t y, int64_t x, V& cotangent) {
          const V xhat = (at(h, b, y, x) - mean) * rstd;
          const V p = rstd * centred<measured()>(at(t, b, y, x), mean_t, xhat, mean_xt);
          const V tangent_cotangent = rstd * centred<measured()>(weight * at(m, b, y, x), mean_c, xhat, mean_xc);
          cotangent = centred<measured()>(weight * at(n, b, y, x), mean_n, xhat, mean_xn);
          if constexpr (measured()) cotangent = cotangent - mean_xt * tangent_cotangent - mean_xc * p;
          cotangent *= rstd;
          return tangent_cotangent;
        };
        if (tangent_out) {
          walk(area, [&](int64_t y, int64_t x) {
            V cotangent;
            const V tangent_cotangent = both(y, x, cotangent);
            put(out, b, y, x, combined(cotangent, b, y, x));
            put(second_out, b, y, x, tangent_cotangent);
          });
        } else {
          walk(area, [&](int64_t y, int64_t x) {
            V cotangent;
            both(y, x, cotangent);
            put(out, b, y, x, combined(cotangent, b, y, x));
          });
        }
      }
    });
  });
}

template <class A>
void combine_maps(const Plane<A>& plane, int64_t blocks, const View<A>& map, const Combine<A>& combine) {
  const View<A> out = map;
  const Area area = area_of(plane, out, combine);
  with_count(combine, [&](const auto& combined) {
    for (int64_t b = 0; b < blocks; ++b)
      walk(area, [&](int64_t y, int64_t x) { put(out, b, y, x, combined(Vec<A>{}, b, y, x)); });
  });
}

template <class A>
void add_channel_sums(const Plane<A>& plane, int64_t blocks, const View<A>& map, A* sums) {
  using V = Vec<A>;
  const View<A> from = map;
  const Area area = area_of(plane, from);
  for (int64_t b = 0; b < blocks; ++b) {
    V total[1];
    walk_sums<1, A>(area, total, [&](int64_t y, int64_t x, V* sum) { sum[0] += at(from, b, y, x); });
    store<V>(sums + b * kLanes<A>, at(sums, b) + total[0]);
  }
}

template <class A>
double inner_product(const Plane<A>& plane, int64_t blocks, const View<A>& left, const View<A>& right) {
  using V = Vec<A>;
  const View<A> a = left, c = right;
  const Area area = area_of(plane, a, c);
  double result = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    V total[1];
    walk_sums<1, A>(area, total, [&](int64_t y, int64_t x, V* sum) { sum[0] += at(a, b, y, x) * at(c, b, y, x); });
    for (int lane = 0; lane < kLanes<A>; ++lane) result += static_cast<double>(total[0][lane]);
  }
  return result;
}

}  // namespace fastode::resident
