//! The working set of a program, guessed from the pages it touches: `cargo run -p lcbst --example quick`.

use std::num::NonZeroU32;

use lcbst::CountingTree;

fn main() {
    let mut pages: CountingTree<u64> = CountingTree::with_half_life(NonZeroU32::new(4));

    // Sixteen epochs of a loop over a few pages and a sweep over many, then a new phase with another loop.
    for epoch in 0..24 {
        let hot = if epoch < 16 { 0x100..0x108 } else { 0x200..0x208 };
        for page in hot {
            pages.touch(page, 10);
        }
        for page in 0..64 {
            pages.touch(0x1000 + epoch * 64 + page, 1);
        }
        pages.advance(1);
    }

    println!("{} pages seen, {} bytes, {:?}", pages.len(), pages.memory_bytes(), pages.depth_statistics());
    for (page, stored) in pages.top_k(12) {
        println!("page {page:#06x}: {:7.3} accesses in units of today", pages.in_units_of_today(stored));
    }
    for (name, range) in [("old loop", 0x100..0x200), ("new loop", 0x200..0x300), ("sweep", 0x1000..0x2000)] {
        println!("{name}: {:7.3}", pages.in_units_of_today(pages.weight_of(range)));
    }
}
