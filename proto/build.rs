//! Compiles the contract with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const CONTRACT: &str = "pinfold/v1/pinfold.proto";
    println!("cargo:rerun-if-changed={CONTRACT}");
    let descriptors = protox::compile([CONTRACT], ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
