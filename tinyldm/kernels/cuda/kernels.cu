// Kernels of float32 numbers, started by launch.py. Arrays lie in C order, without gaps.
//
// This is a subset of CUDA that a compiler for the CPU takes as well: threads of a block, shared
// memory and __syncthreads, no warps and no templates. So the tests run these very lines.

#define THREADS 256  // of a block, at most: launch.py has the same number

// Each thread does every so-many-th of `count` numbers.
#define EACH(i, count)                                                           \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (count); \
         i += gridDim.x * (long long)blockDim.x)

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

// The largest of one number of each thread of a block, at every thread.
__device__ inline float block_max(float value, float* shared) {
    int t = threadIdx.y * blockDim.x + threadIdx.x, count = blockDim.x * blockDim.y;
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

// y (rows, d) of x = [value, gate] (rows, 2 d); count = rows · d.
extern "C" __global__ void geglu(const float* x, float* y, int d, long long count) {
    EACH(i, count) {
        long long at = i / d * 2 * d + i % d;
        float gate = x[at + d];
        y[i] = x[at] * gate * normcdff(gate);
    }
}

extern "C" __global__ void geglu_backward(
        const float* x, const float* dy, float* dx, int d, long long count) {
    EACH(i, count) {
        long long at = i / d * 2 * d + i % d;
        float value = x[at], gate = x[at + d];
        dx[at] = dy[i] * gate * normcdff(gate);
        dx[at + d] = dy[i] * value * gelu_slope(gate);
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

// dx, and dw and db as sums over the samples of each blockIdx.x: (gridDim.x, c) each.
//     dx = r (dx̂ − mean(dx̂) − x̂ mean(dx̂ x̂)), where dx̂ = w dh
extern "C" __global__ void normalise_backward(
        const float* x, const float* dy, const float* w, const float* b, const float* stats,
        float* dx, float* dw, float* db, int n, int p, int c, int size, int silu) {
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
                    float* sums = (which ? db : dw) + (long long)blockIdx.x * c + first + k;
                    *sums = sample < (int)gridDim.x ? total : *sums + total;
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

// The windows of outputs, from row `first` of out_h rows on, in x (n, h, w, c), zeros around it:
// rows (n, out_h, out_w, kh, kw, c); count is their size.
extern "C" __global__ void gather(
        const float* x, float* rows, int h, int w, int c, int out_h, int out_w, int kh, int kw,
        int stride, int top, int left, int first, long long count) {
    EACH(i, count) {
        long long rest = i / c;
        int j = rest % kw;
        rest /= kw;
        int u = rest % kh;
        rest /= kh;
        int column = rest % out_w * stride + j - left;
        rest /= out_w;
        int line = (rest % out_h + first) * stride + u - top;
        int inside = 0 <= line && line < h && 0 <= column && column < w;
        rows[i] = inside ? x[((rest / out_h * h + line) * w + column) * c + i % c] : 0;
    }
}

// dx (n, h, w, c) from the gradients of all windows, rows (n, out_h, out_w, kh, kw, c): each pixel
// adds up those that it was gathered into, always in one order.
extern "C" __global__ void scatter(
        const float* rows, float* dx, int h, int w, int c, int out_h, int out_w, int kh, int kw,
        int stride, int top, int left, long long count) {
    EACH(i, count) {
        long long rest = i / c;
        int x = rest % w + left;
        rest /= w;
        int y = rest % h + top;
        rest /= h;
        float sum = 0;
        for (int u = y % stride; u < kh && u <= y; u += stride)
            for (int j = x % stride; j < kw && j <= x; j += stride) {
                int line = (y - u) / stride, column = (x - j) / stride;
                if (line < out_h && column < out_w)
                    sum += rows[((((rest * out_h + line) * out_w + column) * kh + u) * kw + j) * c + i % c];
            }
        dx[i] = sum;
    }
}

// ------------------------------------------------------------------------ embedding, optimizer

// dtable (vocabulary, d), zeros before, from dy (n, d) at ids (n,); count = n · d. The thread of an
// id's first place adds up all places, always in one order.
extern "C" __global__ void embedding_backward(
        const long long* ids, const float* dy, float* dtable, int n, int d, long long count) {
    EACH(i, count) {
        int place = i / d;
        long long id = ids[place];
        float sum = 0;
        for (int j = 0; j < n; j++)
            if (ids[j] == id) {
                if (j < place) break;
                sum += dy[(long long)j * d + i % d];
            }
        if (sum != 0) dtable[id * d + i % d] = sum;
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

// p = a I + b S + c S² of matrices (n, m, m), from S and S².
extern "C" __global__ void polynomial(
        const float* square, const float* fourth, float* p, float a, float b, float c, int m,
        long long count) {
    EACH(i, count) {
        long long place = i % ((long long)m * m);
        p[i] = b * square[i] + c * fourth[i] + (place / m == place % m ? a : 0);
    }
}

// Each matrix of `size` numbers divided by its norm, and times `factor`.
extern "C" __global__ void divide(
        float* matrices, const float* norms, float factor, int size, long long count) {
    EACH(i, count) matrices[i] *= factor / norms[i / size];
}

// w less the change; the moving average follows.
extern "C" __global__ void change_weights(
        float* w, float* average, const float* change, float follow, long long count) {
    EACH(i, count) {
        w[i] -= change[i];
        average[i] += follow * (w[i] - average[i]);
    }
}
