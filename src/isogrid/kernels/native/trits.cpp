// Products with matrices held in trit planes: codes are read as they are packed, and become numbers in registers.
//
// A row of codes is one section or several. In a section of B bytes with d digits a byte, digit k of byte b is column
// k B + b: sixteen bytes beside each other hold sixteen neighbouring columns, which one permutation of a table of levels
// turns into weights. Many rows: blocks of the matrix are written out into the cache, each once for all rows.

#include "few.h"
#include "stages.h"

#include <torch/csrc/autograd/custom_function.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace isogrid {

using at::Tensor;

namespace {

// Rows of x that a written-out block is used for, rows of the matrix and columns of such a block.
constexpr int64_t kRowsAtOnce = 512, kBlockRows = 64, kBlockColumns = 1024;

// What a byte of a section is: a plane in base 4, two planes in base 16, or a plane in base 3.
enum class Kind { crumbs, nibbles, thirds };

struct Section {
  Kind kind;
  int64_t plane, planes, start, bytes;  // the first plane, how many; its place in a row
  int64_t digits() const { return kind == Kind::crumbs ? 4 : kind == Kind::nibbles ? 2 : 5; }
};

struct Layout {
  int64_t columns, group, planes, groups, bytes;
  std::vector<Section> sections;
  Layout(int64_t n, int64_t g, int64_t k, bool thirds) : columns(n), group(g), planes(k), groups((n + g - 1) / g), bytes(0) {
    for (int64_t plane = 0; plane < k;) {
      Section one{thirds ? Kind::thirds : k - plane > 1 ? Kind::nibbles : Kind::crumbs, plane, 1, bytes, 0};
      if (one.kind == Kind::nibbles) one.planes = 2;
      one.bytes = (n + one.digits() - 1) / one.digits();
      bytes += one.bytes;
      plane += one.planes;
      sections.push_back(one);
    }
  }
};

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLane ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

// Digit k of sixteen bytes, where a permutation looks for it: in the low bits, others may be above.
template <Kind kind>
struct Digit {
  __m512i factor;
  __m128i count;
  explicit Digit(int64_t k) {
    int32_t power = 256;
    for (int64_t i = 0; i < k; ++i) power *= 3;
    factor = _mm512_set1_epi32(power);
    count = _mm_cvtsi64_si128(kind == Kind::crumbs ? 2 * k : 4 * k);
  }
  __m512i operator()(const uint8_t* bytes, __mmask16 mask) const {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes));
    if constexpr (kind == Kind::thirds)  // floor(3 ((byte 3^k) mod 256) / 256), both in 16 bits
      return _mm512_mulhi_epu16(_mm512_mullo_epi16(wide, factor), _mm512_set1_epi32(3));
    else
      return _mm512_srl_epi32(wide, count);
  }
};

// The trits that a digit stands for, by its low four bits.
template <Kind kind>
inline __m512 trits_of(int plane) {
  const __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i own = kind == Kind::nibbles && plane == 1 ? _mm512_srli_epi32(place, 2) : place;
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(own, _mm512_set1_epi32(3)), _mm512_set1_epi32(1)));
}

// work(table, digit, columns from, to): all columns of [first, last) in runs of one digit and one group.
template <Kind kind, typename F>
inline void over_runs(const Layout& of, const Section& section, int64_t first, int64_t last, const F& work) {
  for (int64_t k = first / section.bytes; k * section.bytes < last; ++k) {
    const Digit<kind> digit(k);
    const int64_t end = std::min((k + 1) * section.bytes, last);
    for (int64_t c = std::max(first, k * section.bytes); c < end;) {
      const int64_t g = c / of.group, stop = std::min(end, (g + 1) * of.group);
      work(g, digit, section.start - k * section.bytes, c, stop);
      c = stop;
    }
  }
}

// The weights that digits of a group stand for; scales of a row are (groups, planes).
template <Kind kind, typename scalar>
inline __m512 table_of(const Layout& of, const Section& section, const scalar* scales, int64_t g) {
  const scalar* own = scales + g * of.planes + section.plane;
  __m512 table = _mm512_mul_ps(_mm512_set1_ps(static_cast<float>(own[0])), trits_of<kind>(0));
  if constexpr (kind == Kind::nibbles)
    table = _mm512_fmadd_ps(_mm512_set1_ps(static_cast<float>(own[1])), trits_of<kind>(1), table);
  return table;
}

template <typename F>
inline void for_kind(Kind kind, const F& work) {
  switch (kind) {
    case Kind::crumbs: return work(std::integral_constant<Kind, Kind::crumbs>{});
    case Kind::nibbles: return work(std::integral_constant<Kind, Kind::nibbles>{});
    default: return work(std::integral_constant<Kind, Kind::thirds>{});
  }
}

// sums[m] += this section's part of the dots of a row of the matrix with R rows x, `step` numbers apart.
template <Kind kind, int R, typename scalar>
inline void dots_of_section(
    const Layout& of, const Section& section, const uint8_t* codes, const scalar* scales, const float* x, int64_t step,
    __m512 even[R], __m512 odd[R]) {
  over_runs<kind>(of, section, 0, of.columns, [&](int64_t g, const Digit<kind>& digit, int64_t shift, int64_t c, int64_t stop) {
    const __m512 table = table_of<kind>(of, section, scales, g);
    const uint8_t* bytes = codes + shift;
    for (; c + 2 * kLane <= stop; c += 2 * kLane) {
      const __m512 low = _mm512_permutexvar_ps(digit(bytes + c, 0xffff), table);
      const __m512 high = _mm512_permutexvar_ps(digit(bytes + c + kLane, 0xffff), table);
      for (int m = 0; m < R; ++m) {
        even[m] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + m * step + c), even[m]);
        odd[m] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + m * step + c + kLane), odd[m]);
      }
    }
    for (; c < stop; c += kLane) {
      const __mmask16 mask = first_lanes(stop - c);
      const __m512 last = _mm512_permutexvar_ps(digit(bytes + c, mask), table);
      for (int m = 0; m < R; ++m)
        even[m] = _mm512_mask3_fmadd_ps(last, _mm512_maskz_loadu_ps(mask, x + m * step + c), even[m], mask);
    }
  });
}

template <int R, typename scalar>
void few_trits(const Layout& of, const uint8_t* codes, const scalar* scales, int64_t out, const float* x, int64_t step, scalar* y) {
  const int64_t grain = std::max<int64_t>(kThreadBytes / 4 / std::max<int64_t>(of.bytes, 1), 1);
  at::parallel_for(0, out, grain, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      __m512 even[R], odd[R];
      for (int m = 0; m < R; ++m) even[m] = odd[m] = _mm512_setzero_ps();
      for (const Section& section : of.sections)
        for_kind(section.kind, [&](auto kind) {
          dots_of_section<decltype(kind)::value, R>(
              of, section, codes + e * of.bytes, scales + e * of.groups * of.planes, x, step, even, odd);
        });
      for (int m = 0; m < R; ++m)
        y[m * out + e] = static_cast<scalar>(_mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m])));
    }
  });
}

// Columns [first, last) of one row of the matrix, as floats.
template <typename scalar>
void write_row(const Layout& of, const uint8_t* codes, const scalar* scales, int64_t first, int64_t last, float* to) {
  for (const Section& section : of.sections)
    for_kind(section.kind, [&](auto known) {
      constexpr Kind kind = decltype(known)::value;
      over_runs<kind>(of, section, first, last, [&](int64_t g, const Digit<kind>& digit, int64_t shift, int64_t c, int64_t stop) {
        const __m512 table = table_of<kind>(of, section, scales, g);
        for (; c < stop; c += kLane) {
          const __mmask16 mask = first_lanes(stop - c);
          __m512 value = _mm512_permutexvar_ps(digit(codes + shift + c, mask), table);
          if (section.plane > 0) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to + c - first));
          _mm512_mask_storeu_ps(to + c - first, mask, value);
        }
      });
    });
}

template <typename scalar>
void write_row_as(const Layout& of, const uint8_t* codes, const scalar* scales, int64_t first, int64_t last, float* row, scalar* to) {
  if constexpr (std::is_same_v<scalar, float>) {
    write_row(of, codes, scales, first, last, to);
  } else {
    write_row(of, codes, scales, first, last, row);
    round_to(row, last - first, to);
  }
}

struct InPlace {  // features in the order they come
  int64_t row(int64_t feature) const { return feature; }
  bool straight() const { return true; }
};

template <typename scalar>
void many_trits(const Layout& of, const uint8_t* codes, const scalar* scales, int64_t out, const Tensor& x, Tensor& y) {
  constexpr bool paired = !std::is_same_v<scalar, float>;
  const int64_t rows = x.size(0), n = of.columns, whole = paired ? n + n % 2 : n;
  const Tile widest(std::min(rows, kMostRows));
  const scalar* from = x.const_data_ptr<scalar>();
  scalar* to = y.mutable_data_ptr<scalar>();
  for (int64_t top = 0; top < rows; top += kRowsAtOnce) {
    const int64_t some = std::min(rows - top, kRowsAtOnce), tiles = (some + kMostRows - 1) / kMostRows;
    const auto tile_at = [&](int64_t t) { return Tile(std::min(kMostRows, some - t * kMostRows)); };
    Scratch scratch;
    auto* taken = scratch.take<scalar>(tiles * whole * widest.stride);
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        load(from + (top + t * kMostRows) * x.stride(0), x.stride(0), n, InPlace(), whole, tile_at(t), taken + t * whole * widest.stride);
    });
    at::parallel_for(0, (out + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
      Scratch own;
      auto* found = own.take<float>(tiles * kBlockRows * widest.stride);
      auto* block = own.take<scalar>(kBlockRows * kBlockColumns);
      auto* row = own.take<float>(kBlockColumns);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * kBlockRows, count = std::min(kBlockRows, out - first);
        for (int64_t c = 0; c < n; c += kBlockColumns) {
          const int64_t last = std::min(c + kBlockColumns, n), width = std::min(c + kBlockColumns, whole) - c;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t e = first + i;
            write_row_as(of, codes + e * of.bytes, scales + e * of.groups * of.planes, c, last, row, block + i * width);
            if (width > last - c) block[i * width + width - 1] = 0;  // the last number of an odd row has a zero beside it
          }
          for (int64_t t = 0; t < tiles; ++t) {
            const Tile tile = tile_at(t);
            at::native::cpublas::brgemm(
                count, tile.padded, width, width, tile.stride, tile.stride, c > 0, block,
                taken + t * whole * widest.stride + c * tile.stride, found + t * kBlockRows * widest.stride, paired);
          }
        }
        for (int64_t t = 0; t < tiles; ++t)
          store(found + t * kBlockRows * widest.stride, InPlace(), nullptr, to + (top + t * kMostRows) * out + first, out, count, tile_at(t));
      }
      at::native::cpublas::brgemm_release();
    });
  }
}

Layout layout_of(const Tensor& codes, const Tensor& scales, int64_t columns, int64_t group, bool thirds) {
  TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kByte, "trits: codes (out, bytes) are bytes");
  TORCH_CHECK(scales.dim() == 3 && scales.size(0) == codes.size(0), "trits: scales (out, groups, planes)");
  TORCH_CHECK(group > 0 && columns > 0, "trits: no columns, or none in a group");
  const Layout of(columns, group, scales.size(2), thirds);
  TORCH_CHECK(scales.size(1) == of.groups, "trits: ", of.groups, " groups of ", group, " in ", columns, " columns");
  TORCH_CHECK(codes.size(1) == of.bytes, "trits: a row of ", columns, " columns takes ", of.bytes, " bytes");
  return of;
}

template <typename scalar>
void multiply_trits(const Layout& of, const Tensor& codes, const Tensor& scales, const Tensor& x, Tensor& y) {
  const auto* packed = codes.const_data_ptr<uint8_t>();
  const auto* factors = scales.const_data_ptr<scalar>();
  const int64_t rows = x.size(0), out = codes.size(0), pitch = rounded(of.columns);
  if (rows > kFewRows) return many_trits<scalar>(of, packed, factors, out, x, y);
  Scratch scratch;
  auto* taken = scratch.take<float>(rows * pitch);
  for (int64_t m = 0; m < rows; ++m) {
    const scalar* from = x.const_data_ptr<scalar>() + m * x.stride(0);
    for (int64_t j = 0; j < of.columns; ++j) taken[m * pitch + j] = static_cast<float>(from[j]);
  }
  for_rows(rows, [&](auto count) {
    few_trits<decltype(count)::value>(of, packed, factors, out, taken, pitch, y.mutable_data_ptr<scalar>());
  });
}

// y = x Wᵀ, W (out, columns) in trit planes.
Tensor trits_cpu(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t group, bool thirds) {
  if (x.scalar_type() == at::kHalf) return in_floats(trits_cpu, x, codes, scales, group, thirds);
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == scales.scalar_type(), "trits: rows (rows, in) in the dtype of the scales");
  const Layout of = layout_of(codes, scales, x.size(1), group, thirds);
  const Tensor rows = x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
  const Tensor packed = codes.contiguous(), factors = scales.contiguous();
  Tensor y = at::empty({x.size(0), codes.size(0)}, x.options());
  if (y.numel() == 0) return y;
  if (x.scalar_type() == at::kFloat)
    multiply_trits<float>(of, packed, factors, rows, y);
  else
    multiply_trits<at::BFloat16>(of, packed, factors, rows, y);
  return y;
}

template <typename scalar>
void write_matrix(const Layout& of, const Tensor& codes, const Tensor& scales, Tensor& matrix) {
  const auto* packed = codes.const_data_ptr<uint8_t>();
  const auto* factors = scales.const_data_ptr<scalar>();
  auto* to = matrix.mutable_data_ptr<scalar>();
  at::parallel_for(0, codes.size(0), std::max<int64_t>(kThreadBytes / of.columns, 1), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    auto* row = scratch.take<float>(of.columns);
    for (int64_t e = begin; e < end; ++e)
      write_row_as(of, packed + e * of.bytes, factors + e * of.groups * of.planes, 0, of.columns, row, to + e * of.columns);
  });
}

// W itself.
Tensor trit_matrix_cpu(const Tensor& codes, const Tensor& scales, int64_t columns, int64_t group, bool thirds) {
  if (scales.scalar_type() == at::kHalf) return in_floats(trit_matrix_cpu, codes, scales, columns, group, thirds);
  const Layout of = layout_of(codes, scales, columns, group, thirds);
  Tensor matrix = at::empty({codes.size(0), columns}, scales.options());
  if (scales.scalar_type() == at::kFloat)
    write_matrix<float>(of, codes.contiguous(), scales.contiguous(), matrix);
  else
    write_matrix<at::BFloat16>(of, codes.contiguous(), scales.contiguous(), matrix);
  return matrix;
}

template <typename scalar>
void sum_trits(const Layout& of, const Tensor& codes, const Tensor& values, Tensor& sums) {
  const auto* packed = codes.const_data_ptr<uint8_t>();
  const auto* from = values.const_data_ptr<scalar>();
  float* to = sums.mutable_data_ptr<float>();
  at::parallel_for(0, codes.size(0), std::max<int64_t>(kThreadBytes / of.columns, 1), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    auto* row = scratch.take<float>(of.columns);
    for (int64_t e = begin; e < end; ++e) {
      for (int64_t j = 0; j < of.columns; ++j) row[j] = static_cast<float>(from[e * of.columns + j]);
      for (const Section& section : of.sections)
        for_kind(section.kind, [&](auto known) {
          constexpr Kind kind = decltype(known)::value;
          over_runs<kind>(of, section, 0, of.columns, [&](int64_t g, const Digit<kind>& digit, int64_t shift, int64_t c, int64_t stop) {
            __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
            for (; c < stop; c += kLane) {
              const __mmask16 mask = first_lanes(stop - c);
              const __m512i place = digit(packed + e * of.bytes + shift + c, mask);
              const __m512 value = _mm512_maskz_loadu_ps(mask, row + c);
              first = _mm512_fmadd_ps(_mm512_permutexvar_ps(place, trits_of<kind>(0)), value, first);
              if constexpr (kind == Kind::nibbles)
                second = _mm512_fmadd_ps(_mm512_permutexvar_ps(place, trits_of<kind>(1)), value, second);
            }
            float* own = to + (e * of.groups + g) * of.planes + section.plane;
            own[0] += _mm512_reduce_add_ps(first);
            if constexpr (kind == Kind::nibbles) own[1] += _mm512_reduce_add_ps(second);
          });
        });
    }
  });
}

// sums[i, q, k] = sum over the columns j of group q of trit k of (i, j) times values[i, j].
Tensor trit_sums_cpu(const Tensor& codes, const Tensor& values, int64_t planes, int64_t group, bool thirds) {
  if (values.scalar_type() == at::kHalf) return in_floats(trit_sums_cpu, codes, values, planes, group, thirds);
  const int64_t groups = (values.size(1) + group - 1) / group;
  Tensor sums = at::zeros({codes.size(0), groups, planes}, values.options().dtype(at::kFloat));
  const Layout of = layout_of(codes, sums, values.size(1), group, thirds);
  if (values.scalar_type() == at::kFloat)
    sum_trits<float>(of, codes.contiguous(), values.contiguous(), sums);
  else
    sum_trits<at::BFloat16>(of, codes.contiguous(), values.contiguous(), sums);
  return sums.to(values.scalar_type());
}

// ---- gradients: the matrix and the sums are each other's, and the product's are made of them.

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor trits(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t group, bool thirds) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("isogrid::trits", "").typed<decltype(trits)>();
  return op.call(x, codes, scales, group, thirds);
}

Tensor trit_matrix(const Tensor& codes, const Tensor& scales, int64_t columns, int64_t group, bool thirds) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("isogrid::trit_matrix", "").typed<decltype(trit_matrix)>();
  return op.call(codes, scales, columns, group, thirds);
}

Tensor trit_sums(const Tensor& codes, const Tensor& values, int64_t planes, int64_t group, bool thirds) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("isogrid::trit_sums", "").typed<decltype(trit_sums)>();
  return op.call(codes, values, planes, group, thirds);
}

struct Trits : Function<Trits> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t group, bool thirds) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, codes, scales});
    ctx->saved_data["group"] = group;
    ctx->saved_data["thirds"] = thirds;
    return trits(x, codes, scales, group, thirds);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &codes = saved[1], &scales = saved[2], &g = gradients[0];
    const int64_t group = ctx->saved_data["group"].toInt();
    const bool thirds = ctx->saved_data["thirds"].toBool();
    Tensor dx, dscales;
    if (ctx->needs_input_grad(0)) dx = at::matmul(g, trit_matrix(codes, scales, x.size(1), group, thirds));
    if (ctx->needs_input_grad(2)) dscales = trit_sums(codes, at::matmul(g.t(), x), scales.size(2), group, thirds);
    return {dx, Tensor(), dscales, Tensor(), Tensor()};
  }
};

struct TritMatrix : Function<TritMatrix> {
  static Tensor forward(AutogradContext* ctx, const Tensor& codes, const Tensor& scales, int64_t columns, int64_t group, bool thirds) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({codes});
    ctx->saved_data["planes"] = scales.size(2);
    ctx->saved_data["group"] = group;
    ctx->saved_data["thirds"] = thirds;
    return trit_matrix(codes, scales, columns, group, thirds);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor found = trit_sums(
        ctx->get_saved_variables()[0], gradients[0], ctx->saved_data["planes"].toInt(), ctx->saved_data["group"].toInt(),
        ctx->saved_data["thirds"].toBool());
    return {Tensor(), found, Tensor(), Tensor(), Tensor()};
  }
};

struct TritSums : Function<TritSums> {
  static Tensor forward(AutogradContext* ctx, const Tensor& codes, const Tensor& values, int64_t planes, int64_t group, bool thirds) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({codes});
    ctx->saved_data["columns"] = values.size(1);
    ctx->saved_data["group"] = group;
    ctx->saved_data["thirds"] = thirds;
    return trit_sums(codes, values, planes, group, thirds);
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor found = trit_matrix(
        ctx->get_saved_variables()[0], gradients[0], ctx->saved_data["columns"].toInt(), ctx->saved_data["group"].toInt(),
        ctx->saved_data["thirds"].toBool());
    return {Tensor(), found, Tensor(), Tensor(), Tensor()};
  }
};

bool differentiates(const Tensor& one, const Tensor& other) {
  return at::GradMode::is_enabled() && (one.requires_grad() || other.requires_grad());
}

Tensor trits_autograd(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t group, bool thirds) {
  if (differentiates(x, scales)) return Trits::apply(x, codes, scales, group, thirds);
  at::AutoDispatchBelowADInplaceOrView below;
  return trits(x, codes, scales, group, thirds);
}

Tensor trit_matrix_autograd(const Tensor& codes, const Tensor& scales, int64_t columns, int64_t group, bool thirds) {
  if (differentiates(scales, scales)) return TritMatrix::apply(codes, scales, columns, group, thirds);
  at::AutoDispatchBelowADInplaceOrView below;
  return trit_matrix(codes, scales, columns, group, thirds);
}

Tensor trit_sums_autograd(const Tensor& codes, const Tensor& values, int64_t planes, int64_t group, bool thirds) {
  if (differentiates(values, values)) return TritSums::apply(codes, values, planes, group, thirds);
  at::AutoDispatchBelowADInplaceOrView below;
  return trit_sums(codes, values, planes, group, thirds);
}

Tensor trits_autocast(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t group, bool thirds) {
  c10::impl::ExcludeDispatchKeyGuard without(c10::DispatchKey::AutocastCPU);
  const auto dtype = at::autocast::get_autocast_dtype(at::kCPU);
  const auto cast = [&](const Tensor& value) { return at::autocast::cached_cast(dtype, value, c10::DeviceType::CPU); };
  return trits(cast(x), codes, cast(scales), group, thirds);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(isogrid, m) {
  m.def("trits(Tensor x, Tensor codes, Tensor scales, int group, bool thirds) -> Tensor");
  m.def("trit_matrix(Tensor codes, Tensor scales, int columns, int group, bool thirds) -> Tensor");
  m.def("trit_sums(Tensor codes, Tensor values, int planes, int group, bool thirds) -> Tensor");
}

TORCH_LIBRARY_IMPL(isogrid, CPU, m) {
  m.impl("trits", &trits_cpu);
  m.impl("trit_matrix", &trit_matrix_cpu);
  m.impl("trit_sums", &trit_sums_cpu);
}

TORCH_LIBRARY_IMPL(isogrid, Autograd, m) {
  m.impl("trits", &trits_autograd);
  m.impl("trit_matrix", &trit_matrix_autograd);
  m.impl("trit_sums", &trit_sums_autograd);
}

TORCH_LIBRARY_IMPL(isogrid, AutocastCPU, m) {
  m.impl("trits", &trits_autocast);
}

}  // namespace isogrid
