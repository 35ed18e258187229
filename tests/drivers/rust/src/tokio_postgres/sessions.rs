//! What belongs to a connection: notices, notifications, settings, tables.

use crate::clients::{Moving, config, connect, connect_hearing, one};
use drivers::test;
use futures_util::future::join_all;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_postgres::AsyncMessage;

pub fn add() {
    test("notices", notices);
    test("listen", listen);
    test("start-up settings", startup_settings);
    test("settings last", settings_last);
    test("temporary table", temporary_table);
}

async fn hear(messages: &mut UnboundedReceiver<AsyncMessage>) -> String {
    let message = tokio::time::timeout(Duration::from_secs(5), messages.recv()).await;
    match message.expect("nothing heard").unwrap() {
        AsyncMessage::Notice(notice) => format!("{notice:?}"),
        AsyncMessage::Notification(note) => format!("{}: {}", note.channel(), note.payload()),
        _ => panic!("an unknown message"),
    }
}

async fn notices() -> String {
    let (client, mut messages) = connect_hearing().await;
    let run = "DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'zwei: ü'; END $$";
    client.batch_execute(run).await.unwrap();
    client
        .execute("DROP TABLE IF EXISTS matrix.nowhere", &[])
        .await
        .unwrap();
    let mut told = Vec::new();
    for _ in 0..3 {
        told.push(hear(&mut messages).await);
    }
    format!("{told:?}")
}

async fn listen() -> String {
    let (client, mut messages) = connect_hearing().await;
    let other = connect().await;
    client
        .batch_execute("LISTEN \"tokio postgres\"")
        .await
        .unwrap();
    let mut told = Vec::new();
    let notify = "SELECT pg_notify('tokio postgres', $1)";
    for number in 0..3 {
        let text = format!("told {number}");
        other.execute(notify, &[&text]).await.unwrap();
        told.push(hear(&mut messages).await);
    }
    other.execute(notify, &[&"before a query"]).await.unwrap();
    assert_eq!(one::<i32>(&client, "SELECT 1", &[]).await, 1);
    told.push(hear(&mut messages).await);
    client.execute(notify, &[&"to itself"]).await.unwrap();
    told.push(hear(&mut messages).await);
    client.batch_execute("UNLISTEN *").await.unwrap();
    other.execute(notify, &[&"to nobody"]).await.unwrap();
    assert_eq!(one::<i32>(&client, "SELECT 1", &[]).await, 1);
    assert!(messages.try_recv().is_err());
    format!("{told:?}")
}

async fn startup_settings() -> String {
    let mut config = config();
    config
        .application_name("drivers")
        .options("-c search_path=matrix,public -c work_mem=7MB -c TimeZone=Asia/Kathmandu");
    let mut moving = Moving::connect_with(config).await;
    let mut told: Vec<String> = Vec::new();
    for _ in 0..3 {
        for query in [
            "SHOW application_name",
            "SHOW search_path",
            "SHOW work_mem",
            "SHOW TimeZone",
            "SELECT 'item'::regclass::text",
        ] {
            told.push(one(moving.client().await, query, &[]).await);
        }
    }
    format!("{told:?}")
}

/// Ten connections at once, each with settings of its own.
async fn settings_last() -> String {
    let all = (0..10).map(|index| async move {
        let client = connect().await;
        let (name, path) = (format!("number {index}"), format!("schema_{index}, public"));
        let run = format!("SET application_name = '{name}'; SET search_path = {path}");
        client.batch_execute(&run).await.unwrap();
        let set = "SELECT set_config('my.number', $1, false)";
        client.execute(set, &[&name]).await.unwrap();
        for _ in 0..20 {
            let row = client
                .query_one(
                    "SELECT current_setting('application_name'),
                            current_setting('search_path'),
                            current_setting('my.number', true)",
                    &[],
                )
                .await
                .unwrap();
            assert_eq!(row.get::<_, &str>(0), name);
            assert_eq!(row.get::<_, &str>(1), path);
            assert_eq!(row.get::<_, Option<&str>>(2), Some(name.as_str()));
            tokio::task::yield_now().await;
        }
        client.batch_execute("RESET search_path").await.unwrap();
        let path: String = one(&client, "SHOW search_path", &[]).await;
        assert_eq!(path, "\"$user\", public");
    });
    join_all(all).await;
    String::new()
}

async fn temporary_table() -> String {
    let mut moving = Moving::connect().await;
    let client = moving.client().await;
    client
        .batch_execute("CREATE TEMPORARY TABLE mine (a int)")
        .await
        .unwrap();
    for number in 0..5 {
        let insert = "INSERT INTO mine VALUES ($1)";
        moving
            .client()
            .await
            .execute(insert, &[&number])
            .await
            .unwrap();
    }
    let sum: i64 = one(moving.client().await, "SELECT sum(a) FROM mine", &[]).await;
    moving
        .client()
        .await
        .batch_execute("DROP TABLE mine")
        .await
        .unwrap();
    format!("{sum}")
}
