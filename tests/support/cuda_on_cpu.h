// As much of CUDA as kernels.cu needs, on the CPU: blocks one after the other, and of each block the
// threads as coroutines, from one __syncthreads to the next. Their order is reversed each time, so
// that what one thread reads before another has written it comes out wrong.
//
// With -D REAL_THREADS they are threads of the system, for -fsanitize=thread and -fsanitize=address.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

struct Dim { unsigned x = 1, y = 1, z = 1; };
static thread_local Dim threadIdx, blockIdx;
static Dim blockDim, gridDim;
#define __global__
#define __device__ static
#define __shared__ static
static float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678118654752440f); }
using std::min;

#ifdef REAL_THREADS

#include <barrier>
#include <thread>
static std::barrier<>* block_barrier;
static void __syncthreads() { block_barrier->arrive_and_wait(); }

// → 0
template <class F>
static int run(F kernel) {
    unsigned count = blockDim.x * blockDim.y;
    std::barrier<> barrier(count);
    block_barrier = &barrier;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < count; t++)
        threads.emplace_back([&, t] {
            threadIdx = {t % blockDim.x, t / blockDim.x};
            for (unsigned i = 0; i < gridDim.x * gridDim.y; i++) {
                blockIdx = {i % gridDim.x, i / gridDim.x};
                kernel();
                barrier.arrive_and_wait();  // shared memory is the next block's
            }
        });
    for (auto& thread : threads) thread.join();
    return 0;
}

#else

#include <ucontext.h>
static const size_t STACK = 1 << 15;
struct Coroutine { ucontext_t context; std::unique_ptr<char[]> stack; bool done; };
static std::vector<Coroutine> coroutines;
static ucontext_t scheduler;
static unsigned current;
static void (*body)();

static void __syncthreads() { swapcontext(&coroutines[current].context, &scheduler); }

static void start() {
    body();
    coroutines[current].done = true;  // and on to the scheduler, by uc_link
}

template <class F> static F* called;

// → 0, or 1 where some threads of a block wait for others that have ended.
template <class F>
static int run(F kernel) {
    unsigned count = blockDim.x * blockDim.y;
    while (coroutines.size() < count) coroutines.push_back({{}, std::make_unique<char[]>(STACK), true});
    called<F> = &kernel;
    body = [] { (*called<F>)(); };
    for (unsigned i = 0; i < gridDim.x * gridDim.y; i++) {
        blockIdx = {i % gridDim.x, i / gridDim.x};
        for (unsigned t = 0; t < count; t++) {
            Coroutine& one = coroutines[t];
            getcontext(&one.context);
            one.context.uc_stack = {one.stack.get(), 0, STACK};
            one.context.uc_link = &scheduler;
            one.done = false;
            makecontext(&one.context, start, 0);
        }
        for (bool forward = i % 2;; forward = !forward) {
            unsigned ended = 0;
            for (unsigned k = 0; k < count; k++) {
                current = forward ? k : count - 1 - k;
                threadIdx = {current % blockDim.x, current / blockDim.x};
                swapcontext(&scheduler, &coroutines[current].context);
                ended += coroutines[current].done;
            }
            if (ended == count) break;
            if (ended) return 1;
        }
    }
    return 0;
}

#endif

template <class... P>
static int on_cpu(void (*kernel)(P...), const int* grid, const int* block, void** args) {
    gridDim = {(unsigned)grid[0], (unsigned)grid[1]};
    blockDim = {(unsigned)block[0], (unsigned)block[1]};
    return run([&] {
        [&]<size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<P*>(args[I])...); }
        (std::index_sequence_for<P...>());
    });
}
#define ON_CPU(name)                                                     \
    extern "C" int name##_on_cpu(const int* grid, const int* block, void** args) { \
        return on_cpu(name, grid, block, args);                          \
    }
