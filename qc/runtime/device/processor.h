/* processor.h: which instruction sets this CPU has, by the names of /proc/cpuinfo. */
#ifndef QC_PROCESSOR_H_
#define QC_PROCESSOR_H_

/* The first of the needed instruction sets that is missing; NULL where all are there. The list ends
 * with NULL. */
const char *processor_lacks(const char *const *needed);

#endif /* QC_PROCESSOR_H_ */
