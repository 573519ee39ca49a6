//! The option's form; what Services do is shown by the netns suite on a real datapath.

use super::Origin;

#[test]
fn an_origin_names_its_sort() {
    assert_eq!("dir:/etc/objects".parse(), Ok(Origin::Dir("/etc/objects".into())));
    for bad in ["/etc/objects", "dir:", "kube:x", ""] {
        assert!(bad.parse::<Origin>().is_err(), "{bad}");
    }
}
