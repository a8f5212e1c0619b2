// Kernels of float32 numbers, started by launch.py. Arrays lie in C order, without gaps.
//
// This is a subset of CUDA that a compiler for the CPU takes as well: threads of a block, shared
// memory and __syncthreads, no warps and no templates. So the tests run these very lines.

#define THREADS 256  // of a block, at most: launch.py has the same number

// Each thread does every so-many-th of `count` numbers.
#define EACH(i, count)                                                           \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (count); \
         i += gridDim.x * (long long)blockDim.x)

// Threads of one threadIdx.y do every so-many-th of `count` rows, and of a row every so-many-th of
// its `width` numbers each. So where a number is in its row needs no division, and where a row is
// needs short ones: a division of long long takes a GPU as long as ten products.
#define EACH_ROW(row, count)                                               \
    for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < (count); \
         row += gridDim.x * blockDim.y)
#define EACH_OF_ROW(k, width) for (int k = threadIdx.x; k < (width); k += blockDim.x)

// The sum of one number of each thread of a block, at every thread.
__device__ inline float block_sum(float value, float* shared) {
    int t = threadIdx.y * blockDim.x + threadIdx.x, count = blockDim.x * blockDim.y;
    shared[t] = value;
    for (int half = (count + 1) / 2; count > 1; count = half, half = (count + 1) / 2) {
        __syncthreads();
        if (t < count - half) shared[t] += shared[t + half];
    }
    __syncthreads();
    float total = shared[0];
    __syncthreads();  // the next call writes
    return total;
}

// The largest of one number of each thread of a block, at every thread. blockDim.y is 1.
__device__ inline float block_max(float value, float* shared) {
    int t = threadIdx.x, count = blockDim.x;
    shared[t] = value;
    for (int half = (count + 1) / 2; count > 1; count = half, half = (count + 1) / 2) {
        __syncthreads();
        if (t < count - half) shared[t] = fmaxf(shared[t], shared[t + half]);
    }
    __syncthreads();
    float most = shared[0];
    __syncthreads();
    return most;
}

// ---------------------------------------------------------------------------------- activations

#define SILU 0
#define QUICK_GELU 1
#define GELU 2
#define LEAKY_RELU 3

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

__device__ inline float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1 + x * (1 - s));
}

__device__ inline float gelu_slope(float x) {
    return normcdff(x) + x * 0.3989422804f * expf(-0.5f * x * x);
}

extern "C" __global__ void activation(
        const float* x, float* y, int kind, float slope, long long count) {
    EACH(i, count) {
        float z = x[i];
        if (kind == SILU) y[i] = z * sigmoid(z);
        if (kind == QUICK_GELU) y[i] = z * sigmoid(1.702f * z);
        if (kind == GELU) y[i] = z * normcdff(z);
        if (kind == LEAKY_RELU) y[i] = z > 0 ? z : slope * z;
    }
}

extern "C" __global__ void activation_backward(
        const float* x, const float* dy, float* dx, int kind, float slope, long long count) {
    EACH(i, count) {
        float z = x[i];
        if (kind == SILU) dx[i] = dy[i] * silu_slope(z);
        if (kind == QUICK_GELU) dx[i] = dy[i] * silu_slope(1.702f * z);
        if (kind == GELU) dx[i] = dy[i] * gelu_slope(z);
        if (kind == LEAKY_RELU) dx[i] = z > 0 ? dy[i] : slope * dy[i];
    }
}

// y (rows, d) of x = [value, gate] (rows, 2 d).
extern "C" __global__ void geglu(const float* x, float* y, int d, int rows) {
    EACH_ROW(row, rows)
        EACH_OF_ROW(k, d) {
            const float* at = x + (long long)row * 2 * d + k;
            y[(long long)row * d + k] = at[0] * at[d] * normcdff(at[d]);
        }
}

extern "C" __global__ void geglu_backward(
        const float* x, const float* dy, float* dx, int d, int rows) {
    EACH_ROW(row, rows)
        EACH_OF_ROW(k, d) {
            long long at = (long long)row * 2 * d + k;
            float value = x[at], gate = x[at + d], dz = dy[(long long)row * d + k];
            dx[at] = dz * gate * normcdff(gate);
            dx[at + d] = dz * value * gelu_slope(gate);
        }
}

// ----------------------------------------------------------------------------------------- sums

// sums (gridDim.y, c) of the rows of x (rows, c): each blockIdx.y adds up every so-many-th row.
// Threads are columns (x) and rows (y).
extern "C" __global__ void column_sums(const float* x, float* sums, int rows, int c) {
    __shared__ float shared[THREADS];
    int k = blockIdx.x * blockDim.x + threadIdx.x, at = threadIdx.y * blockDim.x + threadIdx.x;
    float sum = 0;
    if (k < c)
        for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y)
            sum += x[(long long)row * c + k];
    shared[at] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && k < c) {
        for (int i = 1; i < blockDim.y; i++) sum += shared[i * blockDim.x + threadIdx.x];
        sums[(long long)blockIdx.y * c + k] = sum;
    }
}

// ---------------------------------------------------------------------------------------- norms

// x (n, p, c), each sample normalised over p positions and a group of `size` channels, and SiLU of
// it where `silu` says so. A block takes one group (blockIdx.y) of every so-many-th sample; its
// threads are channels (x) and positions (y). Layer norm is p = 1, size = c.
// stats (3, n, groups): the mean, what rounding left of it, and 1 / √(variance + eps).
extern "C" __global__ void normalise(
        const float* x, const float* w, const float* b, float* y, float* stats,
        int n, int p, int c, int size, float eps, int silu) {
    __shared__ float shared[THREADS];
    int groups = gridDim.y, first = blockIdx.y * size;
    float count = (float)p * size;
    for (int sample = blockIdx.x; sample < n; sample += gridDim.x) {
        long long start = (long long)sample * p * c + first;
        float sum = 0, rest = 0, squares = 0;
        for (int i = threadIdx.y; i < p; i += blockDim.y)
            for (int k = threadIdx.x; k < size; k += blockDim.x)
                sum += x[start + (long long)i * c + k];
        float mean = block_sum(sum, shared) / count;
        for (int i = threadIdx.y; i < p; i += blockDim.y)
            for (int k = threadIdx.x; k < size; k += blockDim.x) {
                float centred = x[start + (long long)i * c + k] - mean;
                rest += centred;
                squares += centred * centred;
            }
        rest = block_sum(rest, shared) / count;
        float variance = block_sum(squares, shared) / count - rest * rest;
        float r = 1 / sqrtf(fmaxf(variance, 0) + eps);
        for (int i = threadIdx.y; i < p; i += blockDim.y)
            for (int k = threadIdx.x; k < size; k += blockDim.x) {
                long long at = start + (long long)i * c + k;
                float h = (x[at] - mean - rest) * r * w[first + k] + b[first + k];
                y[at] = silu ? h * sigmoid(h) : h;
            }
        if (threadIdx.x + threadIdx.y == 0) {
            int at = sample * groups + blockIdx.y;
            stats[at] = mean;
            stats[n * groups + at] = rest;
            stats[2 * n * groups + at] = r;
        }
    }
}

// dx, and sums (gridDim.x, 2, c) over the samples of each blockIdx.x: of dw, then of db.
//     dx = r (dx̂ − mean(dx̂) − x̂ mean(dx̂ x̂)), where dx̂ = w dh
extern "C" __global__ void normalise_backward(
        const float* x, const float* dy, const float* w, const float* b, const float* stats,
        float* dx, float* sums, int n, int p, int c, int size, int silu) {
    __shared__ float shared[THREADS];
    int groups = gridDim.y, first = blockIdx.y * size;
    float count = (float)p * size;
    for (int sample = blockIdx.x; sample < n; sample += gridDim.x) {
        long long start = (long long)sample * p * c + first;
        int of_group = sample * groups + blockIdx.y;
        float mean = stats[of_group], rest = stats[n * groups + of_group];
        float r = stats[2 * n * groups + of_group], shift = 0, stretch = 0;
        for (int chunk = 0; chunk < size; chunk += blockDim.x) {
            int k = chunk + threadIdx.x;
            float of_w = 0, of_b = 0;
            if (k < size)
                for (int i = threadIdx.y; i < p; i += blockDim.y) {
                    long long at = start + (long long)i * c + k;
                    float normal = (x[at] - mean - rest) * r, dh = dy[at];
                    if (silu) dh *= silu_slope(normal * w[first + k] + b[first + k]);
                    dx[at] = dh;
                    of_w += dh * normal;
                    of_b += dh;
                }
            for (int which = 0; which < 2; which++) {  // sum over the threads of a channel
                shared[threadIdx.y * blockDim.x + threadIdx.x] = which ? of_b : of_w;
                __syncthreads();
                if (threadIdx.y == 0 && k < size) {
                    float total = 0;
                    for (int i = 0; i < blockDim.y; i++) total += shared[i * blockDim.x + threadIdx.x];
                    long long at = ((long long)blockIdx.x * 2 + which) * c + first + k;
                    sums[at] = sample < (int)gridDim.x ? total : sums[at] + total;
                    if (which) shift += total * w[first + k];
                    else stretch += total * w[first + k];
                }
                __syncthreads();
            }
        }
        shift = block_sum(shift, shared) / count;
        stretch = block_sum(stretch, shared) / count;
        for (int i = threadIdx.y; i < p; i += blockDim.y)
            for (int k = threadIdx.x; k < size; k += blockDim.x) {
                long long at = start + (long long)i * c + k;
                float normal = (x[at] - mean - rest) * r;
                dx[at] = r * (w[first + k] * dx[at] - shift - normal * stretch);
            }
    }
}

// ------------------------------------------------------------------------------------ attention

// Scores (rows, m), one block a row, become softmax(scale · scores) in their place. Row r is of
// token first + r % l, which attends to tokens 0…itself alone where `causal` says so.
// stats (2, rows): the largest scaled score, and the sum of e^(scaled score − it). As one number,
// the logarithm of the softmax's denominator, large scores would cost digits.
extern "C" __global__ void softmax(
        float* scores, float* stats, float scale, int l, int first, int m, int causal) {
    __shared__ float shared[THREADS];
    float* row = scores + blockIdx.x * (long long)m;
    int seen = causal ? min(m, first + (int)(blockIdx.x % l) + 1) : m;
    float most = scale * row[0], sum = 0;
    for (int j = threadIdx.x; j < seen; j += blockDim.x) most = fmaxf(most, scale * row[j]);
    most = block_max(most, shared);
    for (int j = threadIdx.x; j < seen; j += blockDim.x) sum += row[j] = expf(scale * row[j] - most);
    sum = block_sum(sum, shared);
    for (int j = threadIdx.x; j < m; j += blockDim.x) row[j] = j < seen ? row[j] / sum : 0;
    if (threadIdx.x == 0) {
        stats[blockIdx.x] = most;
        stats[gridDim.x + blockIdx.x] = sum;
    }
}

// Scores become softmax(scale · scores) = p again, and dp becomes scale · p (dp − Σ p dp).
extern "C" __global__ void softmax_backward(
        float* scores, float* dp, const float* stats, float scale, int l, int first, int m,
        int causal) {
    __shared__ float shared[THREADS];
    float* row = scores + blockIdx.x * (long long)m;
    float* gradient = dp + blockIdx.x * (long long)m;
    int seen = causal ? min(m, first + (int)(blockIdx.x % l) + 1) : m;
    float most = stats[blockIdx.x], sum = stats[gridDim.x + blockIdx.x], along = 0;
    for (int j = threadIdx.x; j < m; j += blockDim.x) {
        row[j] = j < seen ? expf(scale * row[j] - most) / sum : 0;
        along += row[j] * gradient[j];
    }
    along = block_sum(along, shared);
    for (int j = threadIdx.x; j < m; j += blockDim.x)
        gradient[j] = scale * row[j] * (gradient[j] - along);
}

// ---------------------------------------------------------------------------------- convolution

// The windows of outputs, from line `first` of out_h lines on, in x (n, h, w, c), zeros around it:
// windows (n, out_h, out_w, kh, kw, c), a row for each of `count` outputs.
extern "C" __global__ void gather(
        const float* x, float* windows, int h, int w, int c, int out_h, int out_w, int kh, int kw,
        int stride, int top, int left, int first, int count) {
    int size = kh * kw * c;
    EACH_ROW(row, count) {
        int sample = row / out_w / out_h;
        int y = (row / out_w % out_h + first) * stride - top, x_ = row % out_w * stride - left;
        EACH_OF_ROW(k, size) {
            int place = k / c, line = y + place / kw, column = x_ + place % kw;
            int inside = 0 <= line && line < h && 0 <= column && column < w;
            long long at = (((long long)sample * h + line) * w + column) * c + k % c;
            windows[(long long)row * size + k] = inside ? x[at] : 0;
        }
    }
}

// dx (n, h, w, c) from the gradients of all windows (n, out_h, out_w, kh, kw, c): each of `count`
// pixels adds up those that it was gathered into, always in one order.
extern "C" __global__ void scatter(
        const float* windows, float* dx, int h, int w, int c, int out_h, int out_w, int kh, int kw,
        int stride, int top, int left, int count) {
    EACH_ROW(pixel, count) {
        int x = pixel % w + left, y = pixel / w % h + top, sample = pixel / w / h;
        EACH_OF_ROW(k, c) {
            float sum = 0;
            for (int u = y % stride; u < kh && u <= y; u += stride)
                for (int j = x % stride; j < kw && j <= x; j += stride) {
                    int line = (y - u) / stride, column = (x - j) / stride;
                    long long window = ((long long)sample * out_h + line) * out_w + column;
                    if (line < out_h && column < out_w)
                        sum += windows[((window * kh + u) * kw + j) * c + k];
                }
            dx[(long long)pixel * c + k] = sum;
        }
    }
}

// ------------------------------------------------------------------------ embedding, optimizer

// dtable (vocabulary, d), zeros before, from dy (n, d) at ids (n,). The thread of an id's first
// place adds up all places, always in one order.
extern "C" __global__ void embedding_backward(
        const long long* ids, const float* dy, float* dtable, int d, int n) {
    EACH_ROW(place, n)
        EACH_OF_ROW(k, d) {
            float sum = 0;
            for (int j = 0; j < n; j++)
                if (ids[j] == ids[place]) {
                    if (j < place) break;
                    sum += dy[(long long)j * d + k];
                }
            if (sum != 0) dtable[ids[place] * d + k] = sum;
        }
}

// One step of AdamW and of the moving average, for the first `decayed` numbers with weight decay.
// The factor of the gradients lies on the device.
extern "C" __global__ void adamw(
        float* w, float* m, float* v, float* average, const float* g, const float* factor,
        float beta1, float beta2, float rate, float small, float shrink, float follow,
        long long decayed, long long count) {
    EACH(i, count) {
        float scaled = g[i] * *factor;
        m[i] = beta1 * m[i] + (1 - beta1) * scaled;
        v[i] = beta2 * v[i] + (1 - beta2) * scaled * scaled;
        w[i] = (i < decayed ? shrink * w[i] : w[i]) - rate * m[i] / (sqrtf(v[i]) + small);
        average[i] += follow * (w[i] - average[i]);
    }
}

// -------------------------------------------------------------------------------------- Muon

// m = β m + (1 − β) g, and what Nesterov's momentum looks ahead to: β m + (1 − β) g once more.
extern "C" __global__ void momentum(
        float* m, const float* g, const float* factor, float* ahead, float beta, long long count) {
    EACH(i, count) {
        float scaled = (1 - beta) * g[i] * *factor;
        m[i] = beta * m[i] + scaled;
        ahead[i] = beta * m[i] + scaled;
    }
}

// Squares x xᵀ (count, m, m), one block a matrix, divided by the square of the norm of x, which is
// the root of their trace, and a little. norms (count,).
extern "C" __global__ void normalise_squares(float* squares, float* norms, int m) {
    __shared__ float shared[THREADS];
    float* square = squares + (long long)blockIdx.x * m * m;
    float trace = 0;
    for (int i = threadIdx.x; i < m; i += blockDim.x) trace += square[(long long)i * m + i];
    float norm = sqrtf(block_sum(trace, shared)) + 1e-7f;
    for (int i = threadIdx.x; i < m * m; i += blockDim.x) square[i] /= norm * norm;
    if (threadIdx.x == 0) norms[blockIdx.x] = norm;
}

// p = a I + b S + c S² of matrices (n, m, m), `count` rows together, from S and S².
extern "C" __global__ void polynomial(
        const float* square, const float* fourth, float* p, float a, float b, float c, int m,
        int count) {
    EACH_ROW(row, count)
        EACH_OF_ROW(k, m) {
            long long i = (long long)row * m + k;
            p[i] = b * square[i] + c * fourth[i] + (k == row % m ? a : 0);
        }
}

// Matrices (n, size), each divided by its norm, and times `factor`.
extern "C" __global__ void divide(
        float* matrices, const float* norms, float factor, int size, int n) {
    EACH_ROW(row, n)
        EACH_OF_ROW(k, size) matrices[(long long)row * size + k] *= factor / norms[row];
}

// w less the change; the moving average follows.
extern "C" __global__ void change_weights(
        float* w, float* average, const float* change, float follow, long long count) {
    EACH(i, count) {
        w[i] -= change[i];
        average[i] += follow * (w[i] - average[i]);
    }
}
