// Memory for large results, gradients above all, which every step needs again and gives back: from the system it would
// come as pages of zeros, one fault each, which cost a fifth of a step of three 2048 wide layers.

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

// Of Python's stable interface.
extern "C" {
void* PyCapsule_New(void* pointer, const char* name, void (*destructor)(void* capsule));
void* PyCapsule_GetPointer(void* capsule, const char* name);
int PyCapsule_IsValid(void* capsule, const char* name);
void* PyErr_NoMemory();
}

#if defined(__linux__) && defined(MADV_FREE)

// Blocks that nobody uses stay mapped. Linux may take their pages whenever it is short of memory, but for the last KEPT
// bytes that were given back: of small pages that offer costs a fifth of what it saves. Used or not, the blocks are
// never more than the largest total that was in use at one time.
class Pool {
    static constexpr int64_t HUGE_PAGE = 2 << 20;
    static constexpr int64_t KEPT = 32 << 20;

    struct Block {
        char* begin;
        int64_t bytes;
        bool is_lent;  // to the system
    };

    std::mutex mutex;
    std::vector<Block> unused;  // the one that has been free for longest comes first
    int64_t used_bytes = 0, unused_bytes = 0, most_used_bytes = 0;

    // Aligned to huge pages, if the system has any to give: see /sys/kernel/mm/transparent_hugepage/enabled.
    static char* map(int64_t bytes) {
        constexpr int ACCESS = PROT_READ | PROT_WRITE, KIND = MAP_PRIVATE | MAP_ANONYMOUS;
        char* begin = (char*)mmap(nullptr, bytes + HUGE_PAGE, ACCESS, KIND, -1, 0);
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
        try {
            unused.push_back({begin, bytes, false});
            unused_bytes += bytes;
        } catch (const std::bad_alloc&) {
            munmap(begin, bytes);
        }
        int64_t newer = 0;
        for (auto block = unused.rbegin(); block != unused.rend(); block++) {
            newer += block->bytes;
            if (newer > KEPT && !block->is_lent) block->is_lent = madvise(block->begin, block->bytes, MADV_FREE) == 0;
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
    std::vector<int64_t> shape, strides;

    static void destroy(DLManagedTensor* managed) {
        PooledTensor* tensor = (PooledTensor*)managed;
        pool().give_back((char*)managed->tensor.data, tensor->bytes);
        delete tensor;
    }
};

// Null if there is no memory.
DLManagedTensor* new_managed_tensor(Type type, int32_t dimensions, const int64_t* sizes) noexcept try {
    constexpr int32_t CPU = 1;
    constexpr uint8_t FLOAT = 2, BFLOAT = 4;
    std::unique_ptr<PooledTensor> tensor(new PooledTensor);
    tensor->shape.assign(sizes, sizes + dimensions);
    tensor->strides.resize(dimensions);
    int64_t count = 1;
    for (int32_t i = dimensions - 1; i >= 0; count *= sizes[i--]) tensor->strides[i] = count;
    const uint8_t bits = type == FLOAT32 ? 32 : 16;
    tensor->bytes = Pool::whole(count * (bits / 8));
    DLTensor& contents = tensor->managed.tensor;
    contents = {nullptr, CPU, 0, dimensions, type == FLOAT32 ? FLOAT : BFLOAT, bits, 1, tensor->shape.data(),
                tensor->strides.data(), 0};
    tensor->managed.deleter = PooledTensor::destroy;
    contents.data = pool().take(tensor->bytes);
    return contents.data ? &tensor.release()->managed : nullptr;
} catch (const std::bad_alloc&) {
    return nullptr;
}

#else

DLManagedTensor* new_managed_tensor(Type, int32_t, const int64_t*) { return nullptr; }

#endif

// For PyTorch to take over, which then gives it another name. A capsule, and no plain pointer, because an interrupt may
// come before that. MemoryError if there is no memory, or none that is kept on this system.
void* new_capsule(Type type, int32_t dimensions, const int64_t* sizes) {
    static constexpr char NAME[] = "dltensor";
    DLManagedTensor* tensor = new_managed_tensor(type, dimensions, sizes);
    if (!tensor) return PyErr_NoMemory();
    void* capsule = PyCapsule_New(tensor, NAME, [](void* capsule) {
        if (!PyCapsule_IsValid(capsule, NAME)) return;
        DLManagedTensor* left = (DLManagedTensor*)PyCapsule_GetPointer(capsule, NAME);
        left->deleter(left);
    });
    if (!capsule) tensor->deleter(tensor);
    return capsule;
}
