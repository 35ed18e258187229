//! COPY both ways, as text and binary.

use crate::connections::{COUNT, Moving, one, run, state};
use drivers::test;
use futures_util::TryStreamExt;

pub fn add() {
    test("copy", copy);
    test("copy binary", copy_binary);
    test("copy broken off", copy_broken_off);
    test("copy refused", copy_refused);
}

const COPY_IN: &str = "COPY matrix.item (id, name) FROM STDIN";

async fn read(moving: &mut Moving, copy: &'static str) -> Vec<u8> {
    let out = moving.connection().await.copy_out_raw(copy).await.unwrap();
    let parts: Vec<_> = out.try_collect().await.unwrap();
    parts.concat()
}

async fn copy() -> String {
    let mut moving = Moving::connect().await;
    let lines: String = (0..50_000)
        .map(|n| format!("{n},\"a \"\"quoted\"\" name, {n}\"\n"))
        .collect();
    let copy = "COPY matrix.item (id, name) FROM STDIN (FORMAT csv)";
    let mut sink = moving.connection().await.copy_in_raw(copy).await.unwrap();
    for part in lines.as_bytes().chunks(1000) {
        sink.send(part).await.unwrap();
    }
    let count = sink.finish().await.unwrap();
    let copy = "COPY (SELECT id, name FROM matrix.item ORDER BY id) TO STDOUT (FORMAT csv)";
    assert!(read(&mut moving, copy).await == lines.as_bytes());
    run(moving.connection().await, "DELETE FROM matrix.item").await;
    format!("{count}")
}

async fn copy_binary() -> String {
    let mut moving = Moving::connect().await;
    let series = "COPY (SELECT n, 'name ' || n FROM generate_series(1, 5000) n)
                  TO STDOUT (FORMAT binary)";
    let rows = read(&mut moving, series).await;
    let copy = "COPY matrix.item (id, name) FROM STDIN (FORMAT binary)";
    let mut sink = moving.connection().await.copy_in_raw(copy).await.unwrap();
    assert!(!sink.is_textual());
    sink.send(rows.as_slice()).await.unwrap();
    let count = sink.finish().await.unwrap();
    let sum: i64 = one(moving.connection().await, "SELECT sum(id) FROM matrix.item").await;
    run(moving.connection().await, "DELETE FROM matrix.item").await;
    format!("{} {count} {sum}", rows.len())
}

async fn copy_broken_off() -> String {
    let mut moving = Moving::connect().await;
    for _ in 0..3 {
        let mut sink = moving
            .connection()
            .await
            .copy_in_raw(COPY_IN)
            .await
            .unwrap();
        sink.send(b"1\tone\n".as_slice()).await.unwrap();
        sink.abort("no more").await.unwrap();
        assert_eq!(one::<i64>(moving.connection().await, COUNT).await, 0);
    }
    String::new()
}

async fn copy_refused() -> String {
    let mut moving = Moving::connect().await;
    let mut told = Vec::new();
    let mut sink = moving
        .connection()
        .await
        .copy_in_raw(COPY_IN)
        .await
        .unwrap();
    sink.send(b"not a number\tx\n".as_slice()).await.unwrap();
    told.push(state(sink.finish().await));
    let copy = "COPY matrix.nowhere FROM STDIN";
    told.push(state(
        moving.connection().await.copy_in_raw(copy).await.map(drop),
    ));
    let copy = "COPY (SELECT 1/(3-n) FROM generate_series(1, 9) n) TO STDOUT";
    let out = moving.connection().await.copy_out_raw(copy).await.unwrap();
    told.push(state(out.try_collect::<Vec<_>>().await));
    assert_eq!(one::<i64>(moving.connection().await, COUNT).await, 0);
    format!("{told:?}")
}
