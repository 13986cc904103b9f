"""How the benchmarks measure: clocks, memory, agreement with float64, tables, records and plots."""
