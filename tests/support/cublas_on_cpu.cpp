// The functions of cuBLAS that tinyldm calls, on the CPU, with its arguments (cublas_api.h).
// Statuses: 0 is success, 1 not initialised, 7 an invalid value, 15 not supported.
#include <cstddef>

extern "C" {

struct Handle { bool has_workspace; };
static Handle only;

int cublasCreate_v2(void** handle) {
    *handle = &only;
    return 0;
}

int cublasSetStream_v2(void* handle, void* stream) {
    static_cast<Handle*>(handle)->has_workspace = false;
    return 0;
}

int cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    static_cast<Handle*>(handle)->has_workspace = workspace && bytes >= (1 << 22);
    return 0;
}

int cublasGemmStridedBatchedEx(
        void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
        const void* a, int a_type, int lda, long long stride_a, const void* b, int b_type, int ldb,
        long long stride_b, const void* beta, void* c, int c_type, int ldc, long long stride_c,
        int count, int compute, int algorithm) {
    if (!handle || !static_cast<Handle*>(handle)->has_workspace) return 1;
    if (a_type || b_type || c_type || compute != 68 || algorithm != -1) return 15;
    if (m < 0 || n < 0 || k < 0 || count < 0 || stride_c < 0) return 7;
    if (lda < (transpose_a ? k : m) || ldb < (transpose_b ? n : k) || ldc < m) return 7;
    if (count > 1 && stride_c < (long long)ldc * (n - 1) + m) return 7;  // they would overlap
    float of_product = *static_cast<const float*>(alpha), of_c = *static_cast<const float*>(beta);
    for (int i = 0; i < count; i++) {
        const float* x = static_cast<const float*>(a) + i * stride_a;
        const float* y = static_cast<const float*>(b) + i * stride_b;
        float* z = static_cast<float*>(c) + i * stride_c;
        for (int row = 0; row < m; row++)
            for (int column = 0; column < n; column++) {
                double sum = 0;
                for (int j = 0; j < k; j++)
                    sum += (double)x[transpose_a ? j + (long long)row * lda : row + (long long)j * lda] *
                           y[transpose_b ? column + (long long)j * ldb : j + (long long)column * ldb];
                float& place = z[row + (long long)column * ldc];
                place = of_product * (float)sum + (of_c ? of_c * place : 0);
            }
    }
    return 0;
}
}
