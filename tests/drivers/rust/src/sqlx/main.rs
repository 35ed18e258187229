//! sqlx: its pool, listener, streams, COPY, and statements kept or not.

mod connections;
mod copies;
mod pools;
mod queries;
mod sessions;
mod transactions;
mod values;

fn main() {
    values::add();
    queries::add();
    transactions::add();
    copies::add();
    sessions::add();
    pools::add();
    drivers::run();
}
