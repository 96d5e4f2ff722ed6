//! Graph IR to kernel IR: one kernel a fused op.
