// The bodies of rows.h. No include guard: rows.cpp includes this once per instruction set, in a namespace that defines
// kVectorBytes, the register blocks, fused multiply-add and the conversions of half types. No lambdas here: the target
// of a region does not reach into them.

template <typename T>
using Vector = typename VectorOf<T, kVectorBytes>::type;

template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}
inline Vector<float> load(const c10::BFloat16* from) { return from_bfloat16(from); }
inline Vector<float> load(const c10::Half* from) { return from_half(from); }

template <typename T>
inline void store(Vector<T> vector, T* to) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}
inline void store(Vector<float> vector, c10::BFloat16* to) { to_bfloat16(vector, to); }
inline void store(Vector<float> vector, c10::Half* to) { to_half(vector, to); }

// The last columns of R rows, fewer than a vector, padded with zeros that add nothing to a sum.
template <int R, typename S, int64_t L>
struct Tail {
  S data[R * L] = {};

  Tail(const S* rows, int64_t stride, int64_t count) {
    for (int r = 0; r < R; ++r) __builtin_memcpy(data + r * L, rows + r * stride, count * sizeof(S));
  }
};

// A tree over the lanes in T; from here on sums are long, hence double.
template <typename T, int bytes = kVectorBytes>
inline double sum_lanes(typename VectorOf<T, bytes>::type vector) {
  if constexpr (bytes == sizeof(T)) {
    return vector[0];
  } else {
    typename VectorOf<T, bytes / 2>::type low, high;
    __builtin_memcpy(&low, &vector, bytes / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&vector) + bytes / 2, bytes / 2);
    return sum_lanes<T, bytes / 2>(low + high);
  }
}

// Two passes over a tile share the fetching of the next one, odd rows in the first pass and even rows in the second, so
// that memory is never idle. The next tile begins where the rows of this one end.
template <bool odd, typename S>
inline void fetch_next(const S* rows, int64_t stride, int64_t row, int64_t columns) {
  if (row % 2 == odd) __builtin_prefetch(rows + row * stride + columns, 0, 2);
}

template <int R, bool fetch, typename S, typename T>
inline void add_rows(const S* rows, int64_t stride, int64_t columns, const Vector<T>* weights, T* sums) {
  Vector<T> sum = load(sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if constexpr (fetch) fetch_next<true>(rows, stride, r, columns);
    sum = fma(weights[r], load(rows + r * stride), sum);
  }
  store(sum, sums);
}

template <int R, bool fetch, typename S, typename T>
void add_rows(const S* rows, int64_t stride, int64_t columns, const T* weights, T* sums) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> broadcast[R];
  for (int r = 0; r < R; ++r) broadcast[r] = Vector<T>{} + weights[r];
  int64_t c = 0;
  for (; c + L <= columns; c += L) add_rows<R, fetch>(rows + c, stride, columns, broadcast, sums + c);
  if (c < columns) add_rows<R, false>(Tail<R, S, L>(rows + c, stride, columns - c).data, L, 0, broadcast, sums + c);
}

template <bool fetch, typename S, typename T>
void weighted_sum(const Tile<S>& tile, const T* weights, T* sums) {
  __builtin_memset(sums, 0, padded_columns(tile.columns) * sizeof(T));
  const S* rows = tile.data;
  int64_t i = 0;
  // Eight rows a sweep: one load and one store of the sums for eight loads of G.
  for (; i + 8 <= tile.rows; i += 8)
    add_rows<8, fetch>(rows + i * tile.stride, tile.stride, tile.columns, weights + i, sums);
  for (; i < tile.rows; ++i) add_rows<1, fetch>(rows + i * tile.stride, tile.stride, tile.columns, weights + i, sums);
}

template <int R, typename S, typename T>
inline void centred_products(const S* rows, int64_t stride, int64_t columns, const T* centre, Vector<T>* alignments,
                             Vector<T>* squares) {
  const Vector<T> mean = load(centre);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    fetch_next<false>(rows, stride, r, columns);
    const Vector<T> difference = load(rows + r * stride) - mean;
    alignments[r] = fma(difference, mean, alignments[r]);
    squares[r] = fma(difference, difference, squares[r]);
  }
}

template <int R, typename S, typename T>
void centred_products(const S* rows, int64_t stride, int64_t columns, const T* centre, double* alignments,
                      double* squared_norms) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> products[R] = {}, squares[R] = {};
  int64_t c = 0;
  for (; c + L <= columns; c += L) centred_products<R>(rows + c, stride, columns, centre + c, products, squares);
  if (c < columns) {
    // The padding of the tail is zero, and so has to be that of the centre.
    const Tail<R, S, L> tail(rows + c, stride, columns - c);
    const Tail<1, T, L> last_centre(centre + c, 0, columns - c);
    centred_products<R>(tail.data, L, 0, last_centre.data, products, squares);
  }
  for (int r = 0; r < R; ++r) {
    alignments[r] += sum_lanes<T>(products[r]);
    squared_norms[r] += sum_lanes<T>(squares[r]);
  }
}

template <typename S, typename T>
void moments(const Tile<S>& tile, const T* weights, T* mean, double* alignments, double* squared_norms) {
  weighted_sum<true>(tile, weights, mean);
  constexpr int R = kDotRows;
  const S* rows = tile.data;
  int64_t i = tile.rows;
  for (; i % R != 0; --i)
    centred_products<1>(rows + (i - 1) * tile.stride, tile.stride, tile.columns, mean, alignments + i - 1,
                        squared_norms + i - 1);
  for (; i > 0; i -= R)
    centred_products<R>(rows + (i - R) * tile.stride, tile.stride, tile.columns, mean, alignments + i - R,
                        squared_norms + i - R);
}

// out[i * out_stride + j] += <a_i, b_j> for R rows a and C rows b.
template <int R, int C, typename S, typename T>
inline void multiply(const S* a, int64_t a_stride, const T* b, int64_t b_stride, Vector<T> (&sums)[R][C]) {
  Vector<T> right[C];
#pragma GCC unroll 16
  for (int j = 0; j < C; ++j) right[j] = load(b + j * b_stride);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    const Vector<T> left = load(a + i * a_stride);
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
  }
}

template <int R, int C, typename S, typename T>
void multiply(const S* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t columns, double* out,
              int64_t out_stride) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> sums[R][C] = {};
  int64_t c = 0;
  for (; c + L <= columns; c += L) multiply<R, C>(a + c, a_stride, b + c, b_stride, sums);
  if (c < columns)
    multiply<R, C>(Tail<R, S, L>(a + c, a_stride, columns - c).data, L,
                   Tail<C, T, L>(b + c, b_stride, columns - c).data, L, sums);
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) out[i * out_stride + j] += sum_lanes<T>(sums[i][j]);
}

template <typename S, typename T>
void products(const Tile<S>& tile, const T* vector, double* products) {
  constexpr int R = 8;
  int64_t i = 0;
  for (; i + R <= tile.rows; i += R)
    multiply<R, 1>(tile.data + i * tile.stride, tile.stride, vector, 0, tile.columns, products + i, 1);
  for (; i < tile.rows; ++i)
    multiply<1, 1>(tile.data + i * tile.stride, tile.stride, vector, 0, tile.columns, products + i, 1);
}

// Blocks on and below the diagonal; a block on it also writes some of what is above.
template <int R, typename T>
void gram_rows(const Tile<T>& tile, int64_t i, double* gram) {
  constexpr int C = kGramColumns;
  const T* rows = tile.data + i * tile.stride;
  double* out = gram + i * tile.rows;
  int64_t j = 0;
  for (; j < i + R && j + C <= tile.rows; j += C)
    multiply<R, C>(rows, tile.stride, tile.data + j * tile.stride, tile.stride, tile.columns, out + j, tile.rows);
  for (; j < i + R; ++j)
    multiply<R, 1>(rows, tile.stride, tile.data + j * tile.stride, tile.stride, tile.columns, out + j, tile.rows);
}

template <int R, typename T>
void gram_from(const Tile<T>& tile, int64_t i, double* gram) {
  for (; i + R <= tile.rows; i += R) gram_rows<R>(tile, i, gram);
  if constexpr (R > 1) gram_from<(R > 2 ? R - 2 : 1)>(tile, i, gram);
}

template <typename T>
void gram(const Tile<T>& tile, double* gram) {
  gram_from<kGramRows>(tile, 0, gram);
}

template <typename From, typename To>
void convert(const From* from, int64_t size, To* to) {
  constexpr int64_t L = kLanes<accumulate_t<From>>;
  int64_t c = 0;
  for (; c + L <= size; c += L) store(load(from + c), to + c);
  for (; c < size; ++c) to[c] = static_cast<To>(from[c]);
}

template <typename S, typename T>
constexpr RowKernels<S, T> kernels() {
  return {weighted_sum<false, S, T>, moments<S, T>, products<S, T>, gram<T>, convert<S, T>, convert<T, S>};
}
