// Memory that a thread keeps between calls.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace moiety {

// Floats aligned to a vector, only ever grown, so that a warm step allocates nothing.
class Scratch {
  public:
    float* at_least(std::int64_t count) {
        if (count > count_) {
            floats_.reset();  // before the new ones are taken, to need less memory
            floats_.reset(static_cast<float*>(::operator new(count * sizeof(float), alignment)));
            count_ = count;
        }
        return floats_.get();
    }

  private:
    static constexpr std::align_val_t alignment{64};
    struct Delete {
        void operator()(float* floats) const { ::operator delete(floats, alignment); }
    };
    std::unique_ptr<float, Delete> floats_;
    std::int64_t count_ = 0;
};

}  // namespace moiety
