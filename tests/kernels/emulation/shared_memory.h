#pragma once

// Shared memory that remembers who touched it since the last barrier. See emulation.h.

#include "fibers.h"

namespace emulation {

template <class Type, int count>
class Shared final : public SharedMemory {
 public:
  class Element {
   public:
    Element(Shared& memory, int index) : memory_(memory), index_(index) {}
    Element& operator=(const Type& value) {
      memory_.note_write(index_);
      memory_.values_[index_] = value;
      return *this;
    }
    operator Type() const {
      memory_.note_read(index_);
      return memory_.values_[index_];
    }

   private:
    Shared& memory_;
    int index_;
  };

  Shared() {
    machine.memories.push_back(this);
    forget();
  }
  Element operator[](int index) {
    if (index < 0 || index >= count) fail("shared memory out of bounds");
    return {*this, index};
  }
  void forget() override {
    for (Access& access : accesses_) access = {};
  }

 private:
  // Who touched an element, and how many barriers the block had passed then.
  struct Access {
    int writer = kNobody, write_time = -1;
    int reader = kNobody, read_time = -1;
  };

  void note_write(int index) {
    Access& access = accesses_[index];
    const int me = machine.current, now = machine.barriers;
    const bool was_read = access.read_time == now && access.reader != me;
    const bool was_written = access.write_time == now && access.writer != me;
    if (was_read || was_written) fail("a race on shared memory: a write without a barrier before it");
    access.writer = me;
    access.write_time = now;
  }
  void note_read(int index) {
    Access& access = accesses_[index];
    const int me = machine.current, now = machine.barriers;
    if (access.writer == kNobody) fail("shared memory is read before it is written");
    if (access.write_time == now && access.writer != me) {
      fail("a race on shared memory: a read without a barrier after the write");
    }
    access.reader = access.read_time == now && access.reader != me ? kSeveral : me;
    access.read_time = now;
  }

  Type values_[count];
  Access accesses_[count];
};

}  // namespace emulation
