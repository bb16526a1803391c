/* See choosing.h. Candidates come off a heap in falling order, so that only those are sorted which
 * top_k and top_p (Holtzman et al. 2020, arXiv:1904.09751) keep. */
#include "choosing.h"

#include <math.h>

/* SplitMix64 (Steele, Lea, Flood 2014): a number in [0, 1) from the state in sampling->seed. */
static double draw(qcm_sampling *sampling) {
  uint64_t mixed = sampling->seed += 0x9e3779b97f4a7c15u;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
  mixed ^= mixed >> 31;
  return (double)(mixed >> 11) * 0x1p-53;
}

static int32_t most_likely(const float *logits, int32_t count) {
  int32_t best = 0;
  for (int32_t i = 0; i < count; i++) {
    if (isnan(logits[i])) return -1;
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

static void sift_down(choosing_entry *heap, int32_t count, int32_t at) {
  choosing_entry moved = heap[at];
  for (int32_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && heap[child + 1].weight > heap[child].weight) child++;
    if (heap[child].weight <= moved.weight) break;
    heap[at] = heap[child];
  }
  heap[at] = moved;
}

/* Move the candidates that are kept to the end of the array, the most likely last; return how many. */
static int32_t keep(choosing_entry *heap, int32_t count, int32_t most, double probability) {
  double sum = 0, kept = 0;
  for (int32_t i = 0; i < count; i++) sum += heap[i].weight;
  for (int32_t at = count / 2 - 1; at >= 0; at--) sift_down(heap, count, at);
  int32_t left = count;
  if (most < count) { /* top_p is of the probability that top_k leaves */
    sum = 0;
    for (int32_t taken = 0; taken < most; taken++) {
      choosing_entry best = heap[0];
      heap[0] = heap[--left];
      sift_down(heap, left, 0);
      heap[left] = best;
      sum += best.weight;
    }
    for (int32_t taken = 1; taken <= most; taken++)
      if ((kept += heap[count - taken].weight) >= probability * sum) return taken;
    return most;
  }
  while (left > 0 && kept < probability * sum) {
    choosing_entry best = heap[0];
    heap[0] = heap[--left];
    sift_down(heap, left, 0);
    heap[left] = best;
    kept += best.weight;
  }
  return count - left;
}

int32_t choose(const float *logits, int32_t count, qcm_sampling *sampling,
               choosing_entry *candidates) {
  int32_t best = most_likely(logits, count);
  if (best < 0 || sampling->temperature == 0) return best;
  for (int32_t i = 0; i < count; i++)
    candidates[i] =
        (choosing_entry){expf((logits[i] - logits[best]) / sampling->temperature), i};
  int32_t most = sampling->top_k > 0 && sampling->top_k < count ? sampling->top_k : count;
  double probability = sampling->top_p > 0 ? sampling->top_p : 1;
  int32_t kept = count;
  if (most < count || probability < 1) kept = keep(candidates, count, most, probability);
  const choosing_entry *first = candidates + (count - kept);
  double sum = 0;
  for (int32_t i = 0; i < kept; i++) sum += first[i].weight;
  double point = draw(sampling) * sum;
  for (int32_t i = 0; i < kept; i++)
    if ((point -= first[i].weight) < 0) return first[i].token;
  return first[kept - 1].token;
}
