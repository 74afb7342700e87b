# The usual names for the tasks of `cargo xtask`, which does the work.

.DEFAULT_GOAL := help
.PHONY: help setup build test test-full lint docs demo demo-local try shell clean

help: ## say this
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install the Debian packages that building and the lab need
	cargo xtask setup --yes

build: ## build everything
	cargo xtask build

test: ## all of CI: setup, format, clippy, docs, tests, the lab's tests
	cargo xtask test

test-full: ## the same, the hazards on every kernel, every failing call, and ten minutes of the torture rig on each file system; writes docs/results
	cargo xtask test-full

lint: ## format and clippy only
	cargo xtask lint

docs: ## the reference of every crate
	cargo xtask docs

demo: ## install, build, and show Pinfold at work in a guest
	cargo xtask demo

demo-local: ## the same without a guest and without RDMA, in seconds
	cargo xtask demo-local

try: ## the lab stays open: pinfoldd on DAX, three commands to type
	cargo xtask try

shell: ## a prompt in the lab's guest
	cargo xtask vm shell

clean: ## remove what was built (kernels stay in the cache)
	cargo clean
