//! Vector widths and missing ops of a backend: kernel IR to kernel IR.
