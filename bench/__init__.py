"""Throughput and memory benchmarks; see docs/performance.md."""
