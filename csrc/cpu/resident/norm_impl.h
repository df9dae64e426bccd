// Included by one .cpp per arithmetic type.
#pragma once

#include "walk.h"

namespace fastode::resident {

template <class T>
void moments(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& map, Number<T>* mean_out,
             Number<T>* squares_out) {
  using V = Vec<Number<T>>;
  constexpr int lanes = kLanes<Number<T>>, unroll = 4;
  constexpr int64_t stretch = 64;  // pixels read twice, so while they are in the first cache
  const Area area = area_of(plane, map);
  for (int64_t b = 0; b < blocks; ++b) {
    V mean = {}, squares = {};
    Number<T> seen = 0;
    for (int64_t y = 0; y < area.rows; ++y) {
      for (int64_t first = 0; first < area.width; first += stretch) {
        const int64_t last = std::min(first + stretch, area.width);
        const Number<T> count = static_cast<Number<T>>(last - first);
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
        const V spread = (deviations[0] + deviations[1]) + (deviations[2] + deviations[3]);
        merge_moments<V>(seen, mean, squares, count, here, spread);
        seen += count;
      }
    }
    store<V>(mean_out + b * lanes, mean);
    store<V>(squares_out + b * lanes, squares);
  }
}

// Calls place(block, y, x, act(norm(h))).
template <class T, class F>
inline void each_value(const Area& area, int64_t blocks, const NormRows<Number<T>>& rows, const Unary<Number<T>>& act,
                       const View<T>& map, const F& place) {
  using V = Vec<Number<T>>;
  const View<T> h = map;
  with_activation(act.kind, [&](auto kind) {
    for (Parts<T> part(area, blocks); part; ++part) {
      const int64_t b = part.block;
      const V mean = at(rows.mean, b), scale = at(rows.rstd, b) * at(rows.weight, b), bias = at(rows.bias, b);
      walk(part.area(), [=](int64_t y, int64_t x) {
        place(b, y, x, activate(kind, (at(h, b, y, x) - mean) * scale + bias, act.arguments));
      });
    }
  });
}

// Calls place(block, y, x, act'(norm(h)) weight P(t)).
template <class T, class F>
inline void each_tangent(const Area& area, int64_t blocks, const NormRows<Number<T>>& rows, const Unary<Number<T>>& act,
                         const View<T>& input, const View<T>& input_tangent, const F& place) {
  using V = Vec<Number<T>>;
  const View<T> h = input, t = input_tangent;
  with_activation(act.kind, [&](auto kind) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
        const V scale = rstd * weight, mean_t = at(rows.t, b), mean_xt = at(rows.xt, b);
        walk(area, [=](int64_t y, int64_t x) {
          const V xhat = (at(h, b, y, x) - mean) * rstd;
          const V tangent = scale * centred<measured()>(at(t, b, y, x), mean_t, xhat, mean_xt);
          place(b, y, x, tangent * activate_first(kind, xhat * weight + bias, act.arguments));
        });
      }
    });
  });
}

// Calls f with what stores a value at a pixel of `map`, combined with other maps.
template <class T, class F>
inline void with_store(const Combine<T>& combine, const View<T>& map, const F& f) {
  const View<T> out = map;
  if (combine.count == 0 && combine.scale == 1)
    f([=](int64_t b, int64_t y, int64_t x, Vec<Number<T>> value) { put(out, b, y, x, value); });
  else
    f([=, combined = Combined<-1, T>(combine)](int64_t b, int64_t y, int64_t x, Vec<Number<T>> value) {
      put(out, b, y, x, combined(value, b, y, x));
    });
}

template <class T>
void apply(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const Unary<Number<T>>& act,
           const View<T>& h, const View<T>& out, const Combine<T>& combine) {
  const Area area = area_of(plane, h, out, combine);
  with_store(combine, out, [&](const auto& place) { each_value(area, blocks, rows, act, h, place); });
}

// norm(h) at the pixels of a block.
template <class T>
struct Normed {
  using V = Vec<Number<T>>;
  View<T> map;
  int64_t block;
  V mean, scale, bias;

  Normed(const NormRows<Number<T>>& rows, const View<T>& map, int64_t b)
      : map(map),
        block(b),
        mean(at(rows.mean, b)),
        scale(at(rows.rstd, b) * at(rows.weight, b)),
        bias(at(rows.bias, b)) {}
  V operator()(int64_t y, int64_t x) const { return (at(map, block, y, x) - mean) * scale + bias; }
};

template <class T>
void join(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const View<T>& h,
          Number<T> step, const NormRows<Number<T>>* skip_rows, const View<T>& skip_map, const View<T>& out_map) {
  using V = Vec<Number<T>>;
  const View<T> skip = skip_map, out = out_map;
  const Area area = area_of(plane, h, skip, out);
  for (Parts<T> part(area, blocks); part; ++part) {
    const int64_t b = part.block;
    const Normed<T> normed(rows, h, b);
    const auto end = [=](int64_t y, int64_t x, V other) {
      put(out, b, y, x, activate<kRelu, V>(normed(y, x) * step + other, {}));
    };
    if (skip_rows) {
      const Normed<T> other(*skip_rows, skip, b);
      walk(part.area(), [=](int64_t y, int64_t x) { end(y, x, other(y, x)); });
    } else {
      walk(part.area(), [=](int64_t y, int64_t x) { end(y, x, at(skip, b, y, x)); });
    }
  }
}

template <class T>
void pull_activation(const Plane<Number<T>>& plane, int64_t blocks, const Unary<Number<T>>& act, const View<T>& map,
                     const View<T>& cotangent, const View<T>& out_map) {
  const View<T> h = map, bar = cotangent, out = out_map;
  const Area area = area_of(plane, h, bar, out);
  with_activation(act.kind, [&](auto kind) {
    for (Parts<T> part(area, blocks); part; ++part) {
      const int64_t b = part.block;
      walk(part.area(), [=](int64_t y, int64_t x) {
        const auto slope = activate_first(kind, at(h, b, y, x), act.arguments);
        put(out, b, y, x, at(bar, b, y, x) * slope);
      });
    }
  });
}

template <class T>
void cotangent_first(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows,
                     const Unary<Number<T>>& act, const View<T>& input, const View<T>& cotangent, const View<T>& out,
                     Number<T>* sums) {
  using V = Vec<Number<T>>;
  const View<T> h = input, g = cotangent, n = out;
  const Area area = area_of(plane, h, g, n);
  with_activation(act.kind, [&](auto kind) {
    for (int64_t b = 0; b < blocks; ++b) {
      const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
      V total[2];
      walk_sums<2, Number<T>>(area, total, [=](int64_t y, int64_t x, V* sum) {
        const V xhat = (at(h, b, y, x) - mean) * rstd;
        const V nbar = at(g, b, y, x) * activate_first(kind, xhat * weight + bias, act.arguments);
        put(n, b, y, x, nbar);
        sum[0] += nbar;
        sum[1] += nbar * xhat;
      });
      for (int s = 0; s < 2; ++s) store<V>(sums + (s * blocks + b) * kLanes<Number<T>>, total[s]);
    }
  });
}

template <class T>
void cotangent_last(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows,
                    const View<T>& input, const View<T>& n_map, const View<T>& out_map, const Combine<T>& combine) {
  using V = Vec<Number<T>>;
  const View<T> h = input, n = n_map, out = out_map;
  const Area area = area_of(plane, h, n, out, combine);
  with_count(combine, [&](const auto& combined) {
    with_flag(rows.measured, [&](auto measured) {
      for (Parts<T> part(area, blocks); part; ++part) {
        const int64_t b = part.block;
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), scale = rstd * at(rows.weight, b);
        const V constant = rstd * at(rows.n, b), slope = rstd * rstd * at(rows.xn, b);
        walk(part.area(), [=](int64_t y, int64_t x) {
          V value = scale * at(n, b, y, x);
          if constexpr (measured()) value = value - constant - slope * (at(h, b, y, x) - mean);
          put(out, b, y, x, combined(value, b, y, x));
        });
      }
    });
  });
}

template <class T>
void tangent_sums(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const View<T>& input,
                  const View<T>& input_tangent, Number<T>* sums) {
  using V = Vec<Number<T>>;
  const View<T> h = input, t = input_tangent;
  const Area area = area_of(plane, h, t);
  for (int64_t b = 0; b < blocks; ++b) {
    const V mean = at(rows.mean, b), rstd = at(rows.rstd, b);
    V total[2];
    walk_sums<2, Number<T>>(area, total, [=](int64_t y, int64_t x, V* sum) {
      const V tangent = at(t, b, y, x);
      sum[0] += tangent;
      sum[1] += tangent * (at(h, b, y, x) - mean);
    });
    total[1] *= rstd;
    for (int s = 0; s < 2; ++s) store<V>(sums + (s * blocks + b) * kLanes<Number<T>>, total[s]);
  }
}

template <class T>
void tangent_apply(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows,
                   const Unary<Number<T>>& act, const View<T>& h, const View<T>& t, const View<T>& out,
                   const Combine<T>& combine) {
  const Area area = area_of(plane, h, t, out, combine);
  with_store(combine, out, [&](const auto& place) { each_tangent(area, blocks, rows, act, h, t, place); });
}

template <class T>
void second_first(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows,
                  const Unary<Number<T>>& act, const View<T>& input, const View<T>& input_tangent,
                  const View<T>& value_cotangent, const View<T>& tangent_cotangent, Number<T>* sums) {
  using V = Vec<Number<T>>;
  const View<T> h = input, t = input_tangent, n = value_cotangent, m = tangent_cotangent;
  const Area area = area_of(plane, h, t, n, m);
  with_activation(act.kind, [&](auto kind) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b), bias = at(rows.bias, b);
        const V mean_t = at(rows.t, b), mean_xt = at(rows.xt, b);
        V total[5];
        walk_sums<5, Number<T>>(area, total, [=](int64_t y, int64_t x, V* sum) {
          const V xhat = (at(h, b, y, x) - mean) * rstd, normed = xhat * weight + bias;
          const V tangent = rstd * centred<measured()>(at(t, b, y, x), mean_t, xhat, mean_xt);
          V second;
          const V first = activate_first_with_second(kind, normed, act.arguments, second);
          const V c = at(m, b, y, x);
          V nbar = at(n, b, y, x) * first;
          if constexpr (kHasSecond<decltype(kind)>) nbar += second * tangent * weight * c;
          const V mbar = c * first;
          put(n, b, y, x, nbar);
          put(m, b, y, x, mbar);
          sum[0] += nbar;
          sum[1] += nbar * xhat;
          sum[2] += mbar;
          sum[3] += mbar * xhat;
          sum[4] += mbar * tangent;
        });
        for (int s = 0; s < 5; ++s) store<V>(sums + (s * blocks + b) * kLanes<Number<T>>, total[s]);
      }
    });
  });
}

template <class T>
void second_last(const Plane<Number<T>>& plane, int64_t blocks, const NormRows<Number<T>>& rows, const View<T>& input,
                 const View<T>& input_tangent, const View<T>& n_map, const View<T>& m_map, const View<T>& out_map,
                 const View<T>* tangent_out, const Combine<T>& combine) {
  using V = Vec<Number<T>>;
  const View<T> h = input, t = input_tangent, n = n_map, m = m_map, out = out_map;
  const View<T> second_out = tangent_out ? *tangent_out : out_map;
  const Area area = area_of(plane, h, t, n, m, out, second_out, combine);
  with_count(combine, [&](const auto& combined) {
    with_flag(rows.measured, [&](auto measured) {
      for (int64_t b = 0; b < blocks; ++b) {
        const V mean = at(rows.mean, b), rstd = at(rows.rstd, b), weight = at(rows.weight, b);
        const V mean_t = at(rows.t, b), mean_xt = at(rows.xt, b), mean_n = at(rows.n, b), mean_xn = at(rows.xn, b);
        const V mean_c = at(rows.c, b), mean_xc = at(rows.xc, b);
        const auto both = [=](int64_t y, int64_t x, V& cotangent) {
          const V xhat = (at(h, b, y, x) - mean) * rstd;
          const V p = rstd * centred<measured()>(at(t, b, y, x), mean_t, xhat, mean_xt);
          const V tangent_cotangent = rstd * centred<measured()>(weight * at(m, b, y, x), mean_c, xhat, mean_xc);
          cotangent = centred<measured()>(weight * at(n, b, y, x), mean_n, xhat, mean_xn);
          if constexpr (measured()) cotangent = cotangent - mean_xt * tangent_cotangent - mean_xc * p;
          cotangent *= rstd;
          return tangent_cotangent;
        };
        if (tangent_out) {
          walk(area, [=](int64_t y, int64_t x) {
            V cotangent;
            const V tangent_cotangent = both(y, x, cotangent);
            put(out, b, y, x, combined(cotangent, b, y, x));
            put(second_out, b, y, x, tangent_cotangent);
          });
        } else {
          walk(area, [=](int64_t y, int64_t x) {
            V cotangent;
            both(y, x, cotangent);
            put(out, b, y, x, combined(cotangent, b, y, x));
          });
        }
      }
    });
  });
}

template <class T>
void combine_maps(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& map, const Combine<T>& combine) {
  const View<T> out = map;
  const Area area = area_of(plane, out, combine);
  with_count(combine, [&](const auto& combined) {
    for (int64_t b = 0; b < blocks; ++b)
      walk(area, [=](int64_t y, int64_t x) { put(out, b, y, x, combined(Vec<Number<T>>{}, b, y, x)); });
  });
}

template <class T>
void add_channel_sums(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& map, Number<T>* sums) {
  using V = Vec<Number<T>>;
  const View<T> from = map;
  const Area area = area_of(plane, from);
  for (int64_t b = 0; b < blocks; ++b) {
    V total[1];
    walk_sums<1, Number<T>>(area, total, [=](int64_t y, int64_t x, V* sum) { sum[0] += at(from, b, y, x); });
    store<V>(sums + b * kLanes<Number<T>>, at(sums, b) + total[0]);
  }
}

template <class T>
double inner_product(const Plane<Number<T>>& plane, int64_t blocks, const View<T>& left, const View<T>& right) {
  using V = Vec<Number<T>>;
  const View<T> a = left, c = right;
  const Area area = area_of(plane, a, c);
  double result = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    V total[1];
    walk_sums<1, Number<T>>(area, total,
                            [=](int64_t y, int64_t x, V* sum) { sum[0] += at(a, b, y, x) * at(c, b, y, x); });
    for (int lane = 0; lane < kLanes<Number<T>>; ++lane) result += static_cast<double>(total[0][lane]);
  }
  return result;
}

}  // namespace fastode::resident
