/* stream_bench.cu - what stands for a client's own kernels between decodes: all blocks busy for a time. */
extern "C" __global__ void stream_bench_work(unsigned long long ns)
{
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - start < ns);
}
