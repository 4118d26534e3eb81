// Hot loops of fst_fast/prefix_tree.py. No dependency on Python or torch: raw pointers in and out, loaded by ctypes.
#include <cstdint>

extern "C" {

// tokens: the sequences one after another; lengths[n]; out[i] = length of the common prefix of sequences i-1 and i.
void fst_common_prefixes(const int64_t* tokens, const int64_t* lengths, int64_t n, int64_t* out) {
  const int64_t* previous = tokens;
  const int64_t* current = tokens;
  for (int64_t i = 0; i < n; ++i) {
    int64_t shared = 0;
    if (i > 0) {
      const int64_t limit = lengths[i - 1] < lengths[i] ? lengths[i - 1] : lengths[i];
      while (shared < limit && previous[shared] == current[shared]) ++shared;
    }
    out[i] = shared;
    previous = current;
    current += lengths[i];
  }
}

}  // extern "C"
