#!/usr/bin/env bash
# Sourced: `source launch/env.sh tpu`, `gpu` or `cpu` sets the compiler's and the runtime's flags.
# What is already set in LIBTPU_INIT_ARGS or XLA_FLAGS stays and comes last, so it wins.
# An unknown flag ends the program, so each is one that libtpu 0.0.42 or jaxlib 0.10.2 takes.
#
# Compiled, not timed: the TPU's flags together turn a layer's gathers into fusions with its matmuls,
# for one slice of v5p:4x4x4 as for two of v6e:4x4.
backend=${1:?tpu, gpu or cpu}

tpu_flags=(
  # Parameters are gathered layer by layer over fsdp: fused with the matmuls, the gathers run beside
  # them, over several steps of them, instead of before them.
  --xla_enable_async_all_gather=true
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  # The core that computes also moves, so that a collective need not wait for a free one.
  --xla_tpu_overlap_compute_collective_tc=true
  # Between slices gradients go over the data centre's network, slow enough to be worth starting
  # while the backward pass goes on, whatever their sizes.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
gpu_flags=(
  # Starts collectives as early and ends them as late as memory allows; in program order they would
  # leave the cores idle.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Layers are scanned: the gather of the next layer, and the scatter of the last one's gradient,
  # run beside this one.
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  # Where a host dies the others wait in a collective: after 10 minutes, longer than any does by
  # itself, they end, and the run can be started again.
  --xla_gpu_nccl_termination_timeout_seconds=600
)

case $backend in
  tpu) export LIBTPU_INIT_ARGS="${tpu_flags[*]} ${LIBTPU_INIT_ARGS:-}" ;;
  gpu)
    export XLA_FLAGS="${gpu_flags[*]} ${XLA_FLAGS:-}"
    # One block from the start cannot fragment; three quarters, the default, waste a quarter, and
    # the rest is for NCCL, cuDNN and the CUDA context.
    export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-true}
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
    # A network that NCCL cannot use is named in the log, not only felt as slowness.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} ;;
  cpu)
    # glibc would map each larger array anew and give it back after: each page costs a fault. From
    # heaps that are never trimmed there are none, and memory stays at its peak. Blocks beyond 64 MiB,
    # as a program's temporaries may be, fit no thread's heap and are mapped anew all the same, but for
    # a single heap: in that, threads that compile or run small operations wait for each other. So as
    # many heaps as glibc likes. docs/bench.md has figures.
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:--1} ;;
  *) echo "error: launch/env.sh $backend: the backend is tpu, gpu or cpu" >&2; exit 2 ;;
esac
