//! Connections by the URL under test, and what cases do with them.

use sqlx::postgres::{PgConnectOptions, PgConnection, Postgres};
use sqlx::{AssertSqlSafe, ConnectOptions, Decode, Error, Executor, Type};

pub const INSERT: &str = "INSERT INTO matrix.item (name) VALUES ($1)";
pub const COUNT: &str = "SELECT count(*) FROM matrix.item";

pub fn options() -> PgConnectOptions {
    drivers::url().parse().unwrap()
}

pub async fn connect() -> PgConnection {
    options().connect().await.unwrap()
}

/// A connection that a pool gives another server whenever it is asked for: one of two
/// rivals begins a transaction on the server that was used last, and the other gives
/// back the one that it held.
pub struct Moving {
    own: PgConnection,
    idle: PgConnection,
    holding: PgConnection,
}

impl Moving {
    pub async fn connect() -> Moving {
        Moving::connect_with(options()).await
    }

    pub async fn connect_with(options: PgConnectOptions) -> Moving {
        let mut holding = connect().await;
        holding.execute("BEGIN").await.unwrap();
        Moving {
            own: options.connect().await.unwrap(),
            idle: connect().await,
            holding,
        }
    }

    pub async fn connection(&mut self) -> &mut PgConnection {
        self.idle.execute("BEGIN").await.unwrap();
        self.holding.execute("COMMIT").await.unwrap();
        std::mem::swap(&mut self.idle, &mut self.holding);
        &mut self.own
    }
}

/// Runs a query without parameters that answers one row of one column.
pub async fn one<T>(connection: &mut PgConnection, query: &str) -> T
where
    T: for<'r> Decode<'r, Postgres> + Type<Postgres> + Send + Unpin,
{
    let query = sqlx::query_scalar(AssertSqlSafe(query.to_string()));
    query.fetch_one(connection).await.unwrap()
}

/// Runs queries that answer nothing, by the simple protocol.
pub async fn run(connection: &mut PgConnection, queries: &str) {
    let queries = sqlx::raw_sql(AssertSqlSafe(queries.to_string()));
    queries.execute(connection).await.unwrap();
}

/// The SQLSTATE of what must have failed on the server.
pub fn state<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(Error::Database(error)) => error.code().unwrap().into_owned(),
        Err(error) => panic!("not an error of Postgres: {error:?}"),
    }
}
