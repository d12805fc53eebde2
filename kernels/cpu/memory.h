// Memory for large gradients, which every step needs again and gives back: from the system it would come as pages of
// zeros, one fault each, which cost a fifth of a step of three 2048 wide layers.

// What a tensor is to DLPack (github.com/dmlc/dlpack, version 0), by which PyTorch takes memory with its deleter.
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};

#if defined(__linux__) && defined(MADV_FREE)

// Blocks that nobody uses stay mapped. Linux may take their pages whenever it is short of memory, but for the first
// KEPT bytes: of small pages that offer costs a fifth of what it saves. All blocks together, used or not, never take
// more than those in use once took at the same time.
class Pool {
    static constexpr int64_t HUGE_PAGE = 2 << 20;
    static constexpr int64_t KEPT = 32 << 20;

    struct Block {
        char* begin;
        int64_t bytes;
    };

    std::mutex mutex;
    std::vector<Block> unused;  // the one that has been free for longest comes first
    int64_t used_bytes = 0, unused_bytes = 0, most_used_bytes = 0;

    // Aligned to huge pages, if the system has any to give: see /sys/kernel/mm/transparent_hugepage/enabled.
    static char* map(int64_t bytes) {
        char* begin = (char*)mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (begin == MAP_FAILED) return nullptr;
        const int64_t before = -(intptr_t)begin & (HUGE_PAGE - 1), after = HUGE_PAGE - before;
        if (before > 0) munmap(begin, before);
        munmap(begin + before + bytes, after);
        madvise(begin + before, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
        return begin + before;
    }

    void unmap_until(int64_t most_unused_bytes) {
        auto block = unused.begin();
        for (; unused_bytes > most_unused_bytes; block++) {
            munmap(block->begin, block->bytes);
            unused_bytes -= block->bytes;
        }
        unused.erase(unused.begin(), block);
    }

public:
    // A multiple of the system's pages, since a part of one cannot be given back.
    static int64_t whole(int64_t bytes) {
        const int64_t page = sysconf(_SC_PAGESIZE);
        return (bytes + page - 1) / page * page;
    }

    // Null if there is no memory.
    char* take(int64_t bytes) {
        std::lock_guard<std::mutex> lock(mutex);
        char* begin = nullptr;
        const auto block = std::find_if(unused.rbegin(), unused.rend(), [&](Block b) { return b.bytes == bytes; });
        if (block != unused.rend()) {
            begin = block->begin;
            unused_bytes -= bytes;
            unused.erase(std::next(block).base());
        } else {
            unmap_until(std::max<int64_t>(0, most_used_bytes - used_bytes - bytes));
            begin = map(bytes);
            if (!begin && unused_bytes > 0) {
                unmap_until(0);
                begin = map(bytes);
            }
            if (!begin) return nullptr;
        }
        used_bytes += bytes;
        most_used_bytes = std::max(most_used_bytes, used_bytes);
        return begin;
    }

    void give_back(char* begin, int64_t bytes) {
        std::lock_guard<std::mutex> lock(mutex);
        used_bytes -= bytes;
        if (unused_bytes + bytes <= KEPT || madvise(begin, bytes, MADV_FREE) == 0) {
            unused.push_back({begin, bytes});
            unused_bytes += bytes;
        } else {  // an old kernel
            munmap(begin, bytes);
        }
    }

    void lock() { mutex.lock(); }
    void unlock() { mutex.unlock(); }
};

// Never destroyed, since tensors may live longer than what is static. A child process must not inherit a lock that one
// of its parent's threads holds.
inline Pool& pool() {
    static Pool* const pool = [] {
        static Pool* const made = new Pool;
        pthread_atfork([] { made->lock(); }, [] { made->unlock(); }, [] { made->unlock(); });
        return made;
    }();
    return *pool;
}

struct PooledTensor {
    DLManagedTensor managed;  // first, so that one is at the other's address
    int64_t bytes;
    std::vector<int64_t> shape;

    static void destroy(DLManagedTensor* managed) {
        PooledTensor* tensor = (PooledTensor*)managed;
        pool().give_back((char*)managed->tensor.data, tensor->bytes);
        delete tensor;
    }
};

// Null if there is no memory.
inline DLManagedTensor* new_tensor(Type type, int32_t dimensions, const int64_t* shape) {
    constexpr int32_t CPU = 1;
    constexpr uint8_t FLOAT = 2, BFLOAT = 4;
    const uint8_t bits = type == FLOAT32 ? 32 : 16;
    const int64_t count = std::accumulate(shape, shape + dimensions, (int64_t)1, std::multiplies<int64_t>());
    const int64_t bytes = Pool::whole(count * (bits / 8));
    char* data = pool().take(bytes);
    if (!data) return nullptr;
    PooledTensor* tensor = new PooledTensor{{}, bytes, {shape, shape + dimensions}};
    const uint8_t code = type == FLOAT32 ? FLOAT : BFLOAT;
    tensor->managed = {{data, CPU, 0, dimensions, code, bits, 1, tensor->shape.data(), nullptr, 0},
                       nullptr,
                       PooledTensor::destroy};
    return &tensor->managed;
}

#else

inline DLManagedTensor* new_tensor(Type, int32_t, const int64_t*) { return nullptr; }

#endif
