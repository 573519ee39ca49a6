//! Prints nanoseconds per packet of the eBPF programs.

fn main() -> anyhow::Result<()> {
    for (name, ns) in terway_tests::prog_bench::measure()? {
        println!("{name:32} {ns:8.1} ns");
    }
    Ok(())
}
