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

// Exchanges bit S of the number of a vector with that of a lane, for two vectors whose numbers differ in it.
template <int64_t S, typename T, int64_t... lane>
inline void exchange(Vector<T>& even, Vector<T>& odd, std::integer_sequence<int64_t, lane...>) {
  constexpr int64_t L = kLanes<T>;
  const Vector<T> low = RGD_EXT_SHUFFLE(T, even, odd, (lane & S ? L + lane - S : lane)...);
  odd = RGD_EXT_SHUFFLE(T, even, odd, (lane & S ? L + lane : lane + S)...);
  even = low;
}

// Of 2 S vectors, added up lane by lane in the tree of sum_lanes: lane i of the first gets the sum of vector i.
template <int64_t S, typename T>
inline void fold(Vector<T>* vectors) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < S; ++i) {
    exchange<S, T>(vectors[i], vectors[i + S], std::make_integer_sequence<int64_t, kLanes<T>>{});
    vectors[i] += vectors[i + S];
  }
  if constexpr (S > 1) fold<S / 2, T>(vectors);
}

// The sums over the lanes of N vectors, padded to a whole number of vectors.
template <int N, typename T>
inline void sum_lanes(const Vector<T>* vectors, T* sums) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 16
  for (int first = 0; first < N; first += L) {
    Vector<T> some[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) some[i] = first + i < N ? vectors[first + i] : Vector<T>{};
    fold<L / 2, T>(some);
    store(some[0], sums + first);
  }
}

template <int R, typename S, typename T>
inline void add_rows(const S* rows, int64_t stride, const Vector<T>* weights, T* sums) {
  Vector<T> sum = load(sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum = fma(weights[r], load(rows + r * stride), sum);
  store(sum, sums);
}

// The columns from c on.
template <int R, typename S, typename T>
inline void add_rows(const S* rows, int64_t stride, int64_t c, int64_t columns, const Vector<T>* weights, T* sums) {
  constexpr int64_t L = kLanes<T>;
  for (; c + L <= columns; c += L) add_rows<R>(rows + c, stride, weights, sums + c);
  if (c < columns) add_rows<R>(Tail<R, S, L>(rows + c, stride, columns - c).data, L, weights, sums + c);
}

template <int R, typename T>
inline void broadcast(const T* weights, Vector<T>* vectors) {
  for (int r = 0; r < R; ++r) vectors[r] = Vector<T>{} + weights[r];
}

// Prefetch to L1 (locality 3) or L2 (2). Always inline: GCC may take a function that only prefetches for one without
// effects, and drop calls of it.
template <int R, int locality, typename S>
__attribute__((always_inline)) inline void fetch(const S* rows, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) __builtin_prefetch(rows + r * stride, 0, locality);
}

// Column c of `rows`, and past their end of the rows that follow.
template <typename S>
inline const S* onward(const S* rows, int64_t c, int64_t columns, const S* following) {
  return c < columns ? rows + c : following + (c - columns);
}

// The R rows after those from row i on, or else the first of the next tile.
template <int R, typename S>
inline const S* rows_after(const Tile<S>& tile, int64_t i) {
  return i + 2 * R <= tile.rows ? tile.data + (i + R) * tile.stride : tile.data + tile.columns;
}

template <int R, typename S, typename T>
int64_t weighted_sum(const Tile<S>& tile, int64_t i, const T* weights, T* sums) {
  constexpr int64_t L = kLanes<T>;
  const int64_t whole = tile.columns / L * L;
  // Measured: four cache lines.
  const int64_t ahead = std::min<int64_t>(256 / sizeof(S), tile.columns);
  for (; i + R <= tile.rows; i += R) {
    const S *rows = tile.data + i * tile.stride, *following = rows_after<R>(tile, i);
    Vector<T> vectors[R];
    broadcast<R>(weights + i, vectors);
    for (int64_t c = 0; c < whole; c += L) {
      fetch<R, 2>(onward(rows, c + ahead, tile.columns, following), tile.stride);
      add_rows<R>(rows + c, tile.stride, vectors, sums + c);
    }
    add_rows<R>(rows, tile.stride, whole, tile.columns, vectors, sums);
  }
  return i;
}

template <typename S, typename T>
void weighted_sum(const Tile<S>& tile, const T* weights, T* sums) {
  __builtin_memset(sums, 0, padded_columns(tile.columns) * sizeof(T));
  // Eight rows a sweep: one load and one store of the sums for eight loads of G.
  weighted_sum<1>(tile, weighted_sum<8>(tile, 0, weights, sums), weights, sums);
}

template <int R, typename S, typename T>
inline void centred_products(const S* rows, int64_t stride, const T* mean, Vector<T>* alignments, Vector<T>* squares) {
  const Vector<T> centre = load(mean);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vector<T> difference = load(rows + r * stride) - centre;
    alignments[r] = fma(difference, centre, alignments[r]);
    squares[r] = fma(difference, difference, squares[r]);
  }
}

// The columns from c on. A mean is zero where it is padded, as a tail is.
template <int R, typename S, typename T>
inline void centred_products(const S* rows, int64_t stride, int64_t c, int64_t columns, const T* mean,
                             Vector<T>* alignments, Vector<T>* squares) {
  constexpr int64_t L = kLanes<T>;
  for (; c + L <= columns; c += L) centred_products<R>(rows + c, stride, mean + c, alignments, squares);
  if (c < columns)
    centred_products<R>(Tail<R, S, L>(rows + c, stride, columns - c).data, L, mean + c, alignments, squares);
}

// R rows of `next`, from row i on, and as many of `tile`, from its end backwards: what came last is still in cache.
template <int R, typename S, typename T>
int64_t moments(const Tile<S>& next, int64_t i, const T* weights, T* next_mean, const Tile<S>& tile, const T* mean,
                double* alignments, double* squared_norms) {
  constexpr int64_t L = kLanes<T>;
  const int64_t both = std::min(next.columns, tile.columns) / L * L;
  // Measured: sixteen cache lines from memory, eight from L2.
  const int64_t ahead = std::min<int64_t>(1024 / sizeof(S), next.columns);
  const int64_t cached = std::min<int64_t>(512 / sizeof(S), tile.columns);
  for (; i + R <= next.rows; i += R) {
    const int64_t j = next.rows - R - i;
    const S *summed = next.data + i * next.stride, *dotted = tile.data + j * tile.stride;
    const S *following = rows_after<R>(next, i), *preceding = j >= R ? dotted - R * tile.stride : dotted;
    Vector<T> vectors[R], products[R] = {}, squares[R] = {};
    broadcast<R>(weights + i, vectors);
    for (int64_t c = 0; c < both; c += L) {
      fetch<R, 3>(onward(summed, c + ahead, next.columns, following), next.stride);
      fetch<R, 3>(onward(dotted, c + cached, tile.columns, preceding), tile.stride);
      add_rows<R>(summed + c, next.stride, vectors, next_mean + c);
      centred_products<R>(dotted + c, tile.stride, mean + c, products, squares);
    }
    add_rows<R>(summed, next.stride, both, next.columns, vectors, next_mean);
    centred_products<R>(dotted, tile.stride, both, tile.columns, mean, products, squares);
    for (int r = 0; r < R; ++r) {
      alignments[j + r] += sum_lanes<T>(products[r]);
      squared_norms[j + r] += sum_lanes<T>(squares[r]);
    }
  }
  return i;
}

template <typename S, typename T>
void moments(const Tile<S>& next, const T* weights, T* next_mean, const Tile<S>& tile, const T* mean,
             double* alignments, double* squared_norms) {
  __builtin_memset(next_mean, 0, padded_columns(next.columns) * sizeof(T));
  const int64_t i = moments<kDotRows>(next, 0, weights, next_mean, tile, mean, alignments, squared_norms);
  moments<1>(next, i, weights, next_mean, tile, mean, alignments, squared_norms);
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
  // As it stands: an unrolled start or end makes GCC 12 spill in the loop, at twice the time.
  Vector<T> sums[R][C] = {};
  int64_t c = 0;
  for (; c + L <= columns; c += L) multiply<R, C>(a + c, a_stride, b + c, b_stride, sums);
  if (c < columns)
    multiply<R, C>(Tail<R, S, L>(a + c, a_stride, columns - c).data, L,
                   Tail<C, T, L>(b + c, b_stride, columns - c).data, L, sums);
  T totals[(R * C + L - 1) / L * L];
  sum_lanes<R * C, T>(&sums[0][0], totals);
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) out[i * out_stride + j] += totals[i * C + j];
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

// The cache lines of a tile, some of which are fetched to L2 with every call: many at once would have to wait.
template <typename S>
struct Lines {
  static constexpr int64_t kLine = 64 / sizeof(S);
  const Tile<S>& tile;
  int64_t some, row = 0, c = 0;

  // In about `calls` calls.
  Lines(const Tile<S>& tile, int64_t calls)
      : tile(tile), some(1 + tile.rows * (tile.columns / kLine + 1) / std::max<int64_t>(calls, 1)) {}

  __attribute__((always_inline)) inline void fetch_some() {
    for (int64_t n = 0; n < some && row < tile.rows; ++n) {
      __builtin_prefetch(tile.data + row * tile.stride + c, 0, 2);
      c += kLine;
      if (c >= tile.columns) {
        c = 0;
        ++row;
      }
    }
  }
};

// Rows i to i + R against C columns from j on, without pairs of rows above the diagonal.
template <int R, int C, typename T>
void multiply_below(const Tile<T>& tile, int64_t i, int64_t j, double* gram) {
  if constexpr (R > 2) {
    if (j - i >= 2) return multiply_below<R - 2, C>(tile, i + 2, j, gram);
  }
  multiply<R, C>(tile.data + i * tile.stride, tile.stride, tile.data + j * tile.stride, tile.stride, tile.columns,
                 gram + i * tile.rows + j, tile.rows);
}

// Blocks on and below the diagonal; a block on it also writes some of what is above.
template <int R, typename S, typename T>
void gram_rows(const Tile<T>& tile, int64_t i, Lines<S>& next, double* gram) {
  constexpr int C = kGramColumns;
  int64_t j = 0;
  for (; j < i + R && j + C <= tile.rows; j += C) {
    next.fetch_some();
    multiply_below<R, C>(tile, i, j, gram);
  }
  for (; j < i + R; ++j) multiply_below<R, 1>(tile, i, j, gram);
}

template <int R, typename S, typename T>
void gram_from(const Tile<T>& tile, int64_t i, Lines<S>& next, double* gram) {
  for (; i + R <= tile.rows; i += R) gram_rows<R>(tile, i, next, gram);
  if constexpr (R > 1) gram_from<(R > 2 ? R - 2 : 1)>(tile, i, next, gram);
}

template <typename S, typename T>
void gram(const Tile<T>& tile, const Tile<S>& next, double* gram) {
  Lines<S> lines(next, tile.rows * tile.rows / (2 * kGramRows * kGramColumns));
  gram_from<kGramRows>(tile, 0, lines, gram);
}

template <int R, typename T>
void cross_gram_from(const Tile<T>& a, int64_t i, const Tile<T>& b, double* products) {
  constexpr int C = kGramColumns;
  for (; i + R <= a.rows; i += R) {
    const T* rows = a.data + i * a.stride;
    double* out = products + i * b.rows;
    int64_t j = 0;
    for (; j + C <= b.rows; j += C)
      multiply<R, C>(rows, a.stride, b.data + j * b.stride, b.stride, a.columns, out + j, b.rows);
    for (; j < b.rows; ++j) multiply<R, 1>(rows, a.stride, b.data + j * b.stride, b.stride, a.columns, out + j, b.rows);
  }
  if constexpr (R > 1) cross_gram_from<(R > 2 ? R - 2 : 1)>(a, i, b, products);
}

template <typename T>
void cross_gram(const Tile<T>& a, const Tile<T>& b, double* products) {
  cross_gram_from<kGramRows>(a, 0, b, products);
}

template <typename S, typename T = accumulate_t<S>>
double sum(const S* values, int64_t size) {
  constexpr int64_t L = kLanes<T>;
  // Two sums hide the latency of an addition.
  Vector<T> sums[2] = {};
  int64_t c = 0;
  for (; c + 2 * L <= size; c += 2 * L)
    for (int s = 0; s < 2; ++s) sums[s] += load(values + c + s * L);
  double total = sum_lanes<T>(sums[0] + sums[1]);
  for (; c < size; ++c) total += values[c];
  return total;
}

template <typename T>
CentredSums centred_sums(const T* x, const T* grads, int64_t size, T centre) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> values{}, squares{}, all{}, products{};
  int64_t c = 0;
  for (; c + L <= size; c += L) {
    const Vector<T> centred = load(x + c) - centre, grad = load(grads + c);
    values += centred;
    squares = fma(centred, centred, squares);
    all += grad;
    products = fma(centred, grad, products);
  }
  CentredSums sums{sum_lanes<T>(values), sum_lanes<T>(squares), sum_lanes<T>(all), sum_lanes<T>(products)};
  for (; c < size; ++c) {
    const double centred = x[c] - centre, grad = grads[c];
    sums.values += centred;
    sums.squares += centred * centred;
    sums.grads += grad;
    sums.products += centred * grad;
  }
  return sums;
}

// x^ = (x - centre) scale + shift.
template <typename T>
struct Normalisation {
  T centre, scale, shift;
};

template <typename S, typename T = accumulate_t<S>>
Normalisation<T> normalisation(const S* x, int64_t size, double eps, bool centred) {
  constexpr int64_t L = kLanes<T>;
  const T centre = centred ? static_cast<T>(sum(x, size) / size) : T{0};
  Vector<T> values{}, squares{};
  int64_t c = 0;
  for (; c + L <= size; c += L) {
    const Vector<T> difference = load(x + c) - centre;
    values += difference;
    squares = fma(difference, difference, squares);
  }
  double rest = sum_lanes<T>(values), square = sum_lanes<T>(squares);
  for (; c < size; ++c) {
    const double difference = static_cast<T>(x[c]) - centre;
    rest += difference;
    square += difference * difference;
  }
  rest = centred ? rest / size : 0;  // of the mean, which was rounded
  const double scale = 1 / std::sqrt(square / size - rest * rest + eps);
  return {centre, static_cast<T>(scale), static_cast<T>(-rest * scale)};
}

template <int R, typename S, typename T>
inline void add_normalised(const S* x, int64_t x_stride, const S* grads, int64_t grads_stride,
                           const Normalisation<T>* rows, T* weight, T* bias) {
  Vector<T> products = load(weight), sums = load(bias);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vector<T> difference = load(x + r * x_stride) - rows[r].centre, grad = load(grads + r * grads_stride);
    products = fma(fma(difference, Vector<T>{} + rows[r].scale, Vector<T>{} + rows[r].shift), grad, products);
    sums += grad;
  }
  store(products, weight);
  store(sums, bias);
}

template <int R, typename S, typename T>
int64_t normalised_products(const Tile<S>& x, const Tile<S>& grads, int64_t i, double eps, bool centred, T* weight,
                            T* bias) {
  constexpr int64_t L = kLanes<T>;
  const int64_t whole = x.columns / L * L, rest = x.columns - whole;
  for (; i + R <= x.rows; i += R) {
    const S *values = x.data + i * x.stride, *from = grads.data + i * grads.stride;
    Normalisation<T> rows[R];
    for (int r = 0; r < R; ++r) rows[r] = normalisation(values + r * x.stride, x.columns, eps, centred);
    for (int64_t c = 0; c < whole; c += L)
      add_normalised<R>(values + c, x.stride, from + c, grads.stride, rows, weight + c, bias + c);
    if (rest)
      add_normalised<R>(Tail<R, S, L>(values + whole, x.stride, rest).data, L,
                        Tail<R, S, L>(from + whole, grads.stride, rest).data, L, rows, weight + whole, bias + whole);
  }
  return i;
}

template <typename S, typename T>
void normalised_products(const Tile<S>& x, const Tile<S>& grads, double eps, bool centred, T* weight, T* bias) {
  for (T* sums : {weight, bias}) __builtin_memset(sums, 0, padded_columns(x.columns) * sizeof(T));
  // Four rows a sweep, as many as keep their numbers in registers.
  const int64_t i = normalised_products<4>(x, grads, 0, eps, centred, weight, bias);
  normalised_products<1>(x, grads, i, eps, centred, weight, bias);
}

// R taps by V vectors of channels in registers. The zero that is subtracted makes a vector of a number, at no cost.
template <int R, int V, typename T>
void tap_block(const T* image, const int64_t* taps, const int64_t* positions, int64_t count, const T* grads,
               int64_t channels, T* products) {
  constexpr int64_t L = kLanes<T>;
  const T* shifted[R];
  Vector<T> sums[R][V];
  for (int r = 0; r < R; ++r) {
    shifted[r] = image + taps[r];
    for (int v = 0; v < V; ++v) sums[r][v] = load(products + r * channels + v * L);
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t position = positions[t];
    Vector<T> grad[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) grad[v] = load(grads + t * channels + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<T> pixel = shifted[r][position] - Vector<T>{};
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[r][v] = fma(pixel, grad[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums[r][v], products + r * channels + v * L);
}

// The channels from c on, V vectors of them at a time.
template <int V, typename T>
void tap_products_from(int64_t c, const T* image, const int64_t* taps, int64_t tap_count, const int64_t* positions,
                       int64_t count, const T* grads, int64_t channels, T* products) {
  constexpr int R = 6 * kTapVectors / V < kTapBlock ? 6 * kTapVectors / V : kTapBlock;
  static_assert(kTapBlock % R == 0);
  for (; c + V * kLanes<T> <= channels; c += V * kLanes<T>)
    for (int64_t r = 0; r < tap_count; r += R)
      tap_block<R, V>(image, taps + r, positions, count, grads + c, channels, products + r * channels + c);
  if constexpr (V > 1) tap_products_from<V / 2>(c, image, taps, tap_count, positions, count, grads, channels, products);
}

template <typename T>
void tap_products(const T* image, const int64_t* taps, int64_t tap_count, const int64_t* positions, int64_t count,
                  const T* grads, int64_t channels, T* products) {
  tap_products_from<kTapVectors>(0, image, taps, tap_count, positions, count, grads, channels, products);
}

template <int64_t S, typename T>
inline void exchange_all(Vector<T>* vectors) {
  constexpr int64_t L = kLanes<T>;
#pragma GCC unroll 16
  for (int64_t i = 0; i < L; ++i)
    if (!(i & S)) exchange<S, T>(vectors[i], vectors[i + S], std::make_integer_sequence<int64_t, L>{});
  if constexpr (S > 1) exchange_all<S / 2, T>(vectors);
}

// Along the rows of `to`, of which there may be so many apart that writing across them would miss the TLB.
template <typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t j = 0; j < columns; j += L) {
    for (int64_t i = 0; i < rows; i += L) {
      if (i + L <= rows && j + L <= columns) {
        Vector<T> vectors[L];
#pragma GCC unroll 16
        for (int64_t r = 0; r < L; ++r) vectors[r] = load(from + (i + r) * from_stride + j);
        exchange_all<L / 2, T>(vectors);
#pragma GCC unroll 16
        for (int64_t c = 0; c < L; ++c) store(vectors[c], to + (j + c) * to_stride + i);
      } else {
        for (int64_t c = j; c < j + L && c < columns; ++c)
          for (int64_t r = i; r < i + L && r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
      }
    }
  }
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
  return {weighted_sum<S, T>, moments<S, T>, products<S, T>,  gram<S, T>,
          cross_gram<T>,      sum<T>,        centred_sums<T>, normalised_products<S, T>,
          tap_products<T>,    transpose<T>,  convert<S, T>,   convert<T, S>};
}
