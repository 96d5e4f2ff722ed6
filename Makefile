# make demo   build nextc and let the demo model answer; needs Rust and a C compiler only
# make test   every check, with LLVM 22 installed through apt and ptxas fetched through pip where they are missing
# make help   the other targets

CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
# The runtime inside every executable is built once and shared by all configurations below.
export NEXTC_RUNTIME_TARGET_DIR := $(abspath $(TARGET_DIR))/runtime
# One set of features for every step of `test`, so that each crate is built once for checking and once for running.
FEATURES := --workspace --features llvm

.PHONY: demo test fmt lint unit doc llvm ptxas help clean

demo: ## compile examples/demo-model and let it answer: PROMPT="..." make demo
	$(CARGO) build --release --locked --bin nextc
	NEXTC=$(TARGET_DIR)/release/nextc DEMO_DIR=$(TARGET_DIR)/demo scripts/demo.sh

test: llvm ptxas fmt lint unit doc ## format, clippy, tests, docs: what CI runs
	@echo "all checks passed"

llvm: ## install LLVM 22 where it is missing
	scripts/install-llvm.sh

ptxas: ## fetch NVIDIA's PTX assembler where it is missing
	CARGO_TARGET_DIR=$(TARGET_DIR) scripts/install-ptxas.sh

fmt:
	$(CARGO) fmt --all --check

lint: ## clippy, with the LLVM backend and without
	$(CARGO) clippy $(FEATURES) --all-targets --locked -- -D warnings
	$(CARGO) clippy --package nextc --all-targets --locked -- -D warnings

unit: ## all tests
	FUZZ_SECONDS=60 $(CARGO) test $(FEATURES) --locked

doc: ## documentation, in which a broken link is an error
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(FEATURES) --no-deps --locked

clean:
	$(CARGO) clean

help:
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'
