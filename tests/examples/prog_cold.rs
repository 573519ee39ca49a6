//! Scratch.
fn main() -> anyhow::Result<()> {
    for _ in 0..4 {
        for (name, ns) in terway_tests::prog_bench::measure()? {
            if name.contains("first") && name.contains("vpc v4") {
                println!("{name} {ns}");
            }
        }
    }
    Ok(())
}
