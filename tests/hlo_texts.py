"""Compiled programs as XLA writes them for TPU and GPU: short, and by hand."""

# ruff: noqa: E501

_HEADER = "HloModule jit_f, num_partitions=4\n\n"

# A loop over the state (counter, x, bound, what the counter was), whose turns are written nowhere.
LOOP = (
    _HEADER
    + """%cond (s: (s32[], f32[4,4], s32[], s32[])) -> pred[] {
  %s = (s32[], f32[4,4], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] get-tuple-element(%s), index=2
  ROOT %more = pred[] @COMPARE@
}

%body (s.1: (s32[], f32[4,4], s32[], s32[])) -> (s32[], f32[4,4], s32[], s32[]) {
  %s.1 = (s32[], f32[4,4], s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %x.1 = f32[4,4] get-tuple-element(%s.1), index=1
  %end.1 = s32[] get-tuple-element(%s.1), index=2
  %by = s32[] constant(@STEP@)
  %next = s32[] add(%i.1, %by)
  %y = f32[4,4] dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4], s32[], s32[]) tuple(%next, %y, %end.1, %i.1)
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4] parameter(0)
  %first = s32[] constant(@FIRST@)
  %begin = s32[] copy(%first)
  %ten = s32[] constant(10)
  %state = (s32[], f32[4,4], s32[], s32[]) tuple(%begin, %x, %ten, %first)
  %loop = (s32[], f32[4,4], s32[], s32[]) while(%state), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %result = f32[4,4] get-tuple-element(%loop), index=1
}
"""
)

# A collective that is started in one fusion, carried on in another beside a product, one with a start and an end of its
# own, and arrays in fast memory, S(1).
TPU = (
    _HEADER
    + """%start_fusion (p: bf16[64,64]) -> (bf16[64,64], bf16[128,64]) {
  %p = bf16[64,64]{1,0} parameter(0)
  %all-gather.1 = bf16[128,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %c = (bf16[64,64]{1,0}, bf16[128,64]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%step_fusion (q: bf16[64,64], l: bf16[8,64], r: bf16[64,32]) -> (bf16[8,32], bf16[128,64]) {
  %q = bf16[64,64]{1,0} parameter(0)
  %l = bf16[8,64]{1,0} parameter(1)
  %r = bf16[64,32]{1,0} parameter(2)
  %product = bf16[8,32]{1,0:T(8,128)(2,1)} convolution(%l, %r), dim_labels=bf_io->bf
  %all-gather.2 = bf16[128,64]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %t = (bf16[8,32]{1,0}, bf16[128,64]{1,0}) tuple(%product, %all-gather.2)
}

ENTRY %main (a: bf16[64,64], l.1: bf16[8,64], r.1: bf16[64,32]) -> bf16[8,32] {
  %a = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %l.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(1)
  %r.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(2)
  %copy-start = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%l.1)
  %copy-done = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %begin = (bf16[64,64]{1,0}, bf16[128,64]{1,0}) fusion(%a), kind=kCustom, calls=%start_fusion
  %step = (bf16[8,32]{1,0:T(8,128)(2,1)S(1)}, bf16[128,64]{1,0:T(8,128)(2,1)S(1)}) fusion(%a, %copy-done, %r.1), calls=%step_fusion
  %all-reduce-start = (bf16[8,32]{1,0}, /*index=1*/bf16[4]{0}) all-reduce-start(%l.1, %r.1), replica_groups={}, to_apply=%add
  %all-reduce-done = (bf16[8,32]{1,0}, bf16[4]{0}) all-reduce-done(%all-reduce-start)
  ROOT %result = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%step), index=0
}
"""
)

# Kernels of libraries: one that tells its dimensions, one that tells its cost, one that tells nothing.
KERNELS = (
    _HEADER
    + """ENTRY %main (a: bf16[8,64], b: bf16[64,32]) -> bf16[8,32] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %gemm = (bf16[8,32]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %kernel = bf16[8,32]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUw","cost_estimate":{"flops":"123","bytes_accessed":"7"}}}
  %attention = bf16[8,32]{1,0} custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %result = bf16[8,32]{1,0} get-tuple-element(%gemm), index=0
}
"""
)
